// Order of the steps, threads and the memory they share; the steps themselves stand in cpu.inl.
#include "relative/relative.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/memory.h"
#include "common/pool.h"

namespace leafkern {
namespace {

constexpr int64_t kThreadPairs = 1 << 14;  // below as many, a thread is not worth waking
constexpr int kMaxSlots = 64;
constexpr int64_t kRows = 8;     // of a matrix, claimed by a thread at a time
constexpr int64_t kWideLimit = 2;  // others inside windows, per pair, that are corrected one by one

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

template <typename Body>
void each(int threads, int64_t count, const Body& body) {
    parallel(
        threads, count,
        [](void* context, int64_t index, int slot) { (*static_cast<const Body*>(context))(index, slot); },
        const_cast<Body*>(&body));
}

struct Layout {
    int64_t pairs, buckets, chunk, chunks;
    int slots;
    size_t ranks, region, histograms, scratch, shares, bounds, rows;

    Layout(const RelativeKernels& kernels, const RelativeArguments& a) {
        pairs = a.batch * (a.batch - 1) / 2;
        slots = static_cast<int>(std::clamp<int64_t>(pairs / kThreadPairs, 1, std::clamp(a.threads, 1, kMaxSlots)));
        buckets = (pairs >> kBucketBits) + 1;
        // Not so short that the shares of chunks and buckets outgrow the pairs.
        chunk = std::min(std::max({pairs / (8 * slots), 8 * buckets, int64_t{1024}}), kMaxChunk);
        chunks = (pairs + chunk - 1) / chunk;
        ranks = aligned(sizeof(uint32_t) * pairs);
        // Records in one region are sorted into the other; then the streams take the one that is free.
        region = aligned(std::max<size_t>(kernels.steps[a.is_double].record, 14) * pairs + 4 * 64);
        histograms = aligned(sizeof(uint32_t) * kBins * slots);
        scratch = aligned(kernels.scratch_size(buckets));
        shares = aligned(sizeof(Share) * chunks * buckets);
        bounds = aligned(sizeof(Chunk) * chunks);
        rows = aligned(sizeof(double) * a.batch);
    }
    size_t total() const {
        return 4 * ranks + 2 * region + histograms + scratch * slots + shares + bounds + rows + 64;
    }
};

class Relative {
  public:
    Relative(const RelativeKernels& kernels, const RelativeArguments& arguments, unsigned char* workspace)
        : kernels_(kernels), steps_(kernels.steps[arguments.is_double]), a_(arguments), layout_(kernels, arguments) {
        unsigned char* at = workspace + (64 - reinterpret_cast<uintptr_t>(workspace) % 64) % 64;
        const auto take = [&at](size_t bytes) { return std::exchange(at, at + bytes); };
        rank_ = reinterpret_cast<uint32_t*>(take(layout_.ranks));
        order_ = reinterpret_cast<uint32_t*>(take(layout_.ranks));
        window_ = reinterpret_cast<uint32_t*>(take(layout_.ranks));
        counts_ = reinterpret_cast<uint32_t*>(take(layout_.ranks));
        records_ = take(layout_.region);
        spare_ = take(layout_.region);
        histograms_ = reinterpret_cast<uint32_t*>(take(layout_.histograms));
        scratch_ = take(layout_.scratch * layout_.slots);
        shares_ = reinterpret_cast<Share*>(take(layout_.shares));
        chunks_ = reinterpret_cast<Chunk*>(take(layout_.bounds));
        rows_ = reinterpret_cast<double*>(take(layout_.rows));
    }

    void run() {
        const bool finite = sort(a_.teacher, nullptr);
        if (finite) rank_teacher();
        for (int width = 0; width < a_.widths; ++width) {
            const size_t score = a_.is_double ? sizeof(double) : sizeof(float);
            const size_t offset = score * a_.batch * a_.batch * width;
            student_ = static_cast<const unsigned char*>(a_.student) + offset;
            gradient_ = a_.gradient ? static_cast<unsigned char*>(a_.gradient) + offset : nullptr;
            if (finite && sort(student_, rank_)) {
                a_.loss[width] = loss();
            } else {
                a_.loss[width] = NAN;
                if (gradient_)
                    each(layout_.slots, a_.batch,
                         [&](int64_t row, int) { steps_.fill_nan(a_.batch, row, gradient_); });
            }
        }
    }

  private:
    // The t ranks [begin, end) of part `part` of as many as there are slots.
    std::pair<int64_t, int64_t> part(int64_t part) const {
        return {layout_.pairs * part / layout_.slots, layout_.pairs * (part + 1) / layout_.slots};
    }

    int64_t sum_of_slots() const {
        int64_t total = 0;
        for (int slot = 0; slot < layout_.slots; ++slot) total += sums_[slot].value;
        return total;
    }
    void clear_sums() {
        for (auto& sum : sums_) sum.value = 0;
    }

    // Leaves the pairs' records, sorted, in records_; false, and no records, if a score is not finite.
    bool sort(const void* matrix, const uint32_t* rank) {
        clear_sums();
        each(layout_.slots, (a_.batch + kRows - 1) / kRows, [&](int64_t index, int slot) {
            const int64_t begin = index * kRows, end = std::min(begin + kRows, a_.batch);
            if (!steps_.load(matrix, a_.batch, begin, end, rank, records_)) ++sums_[slot].value;
        });
        if (sum_of_slots() > 0) return false;
        for (int digit = 0; digit < steps_.digits; ++digit) {
            each(layout_.slots, layout_.slots, [&](int64_t index, int) {
                const auto [begin, end] = part(index);
                steps_.histogram(records_, begin, end, digit, histograms_ + index * kBins);
            });
            if (!place()) continue;
            each(layout_.slots, layout_.slots, [&](int64_t index, int) {
                const auto [begin, end] = part(index);
                steps_.scatter(records_, begin, end, digit, histograms_ + index * kBins, spare_);
            });
            std::swap(records_, spare_);
        }
        return true;
    }

    // Counts of digits -> where each part writes its records; false if all records share one digit.
    bool place() {
        int64_t next = 0;
        for (int bin = 0; bin < kBins; ++bin) {
            const int64_t first = next;
            for (int slot = 0; slot < layout_.slots; ++slot) {
                uint32_t& count = histograms_[slot * kBins + bin];
                next += std::exchange(count, static_cast<uint32_t>(next));
            }
            if (next - first == layout_.pairs) return false;
        }
        return true;
    }

    void rank_teacher() {
        each(layout_.slots, layout_.slots, [&](int64_t index, int) {
            const auto [begin, end] = part(index);
            steps_.invert(records_, a_.batch, begin, end, rank_, order_);
        });
        if (!windows_matter()) return;
        clear_sums();
        each(layout_.slots, layout_.slots, [&](int64_t index, int slot) {
            const auto [begin, end] = part(index);
            sums_[slot].value += steps_.windows(records_, layout_.pairs, begin, end, a_.min_gap, window_);
        });
        wide_ = sum_of_slots() > kWideLimit * layout_.pairs;
    }

    // With ties="reference" and no gap the order of T says it all.
    bool windows_matter() const { return !a_.reference_ties || a_.min_gap > 0; }

    // Sum over the pairs of pairs that are violated, divided by the number of all; the gradient.
    double loss() {
        int64_t violations = 0;
        if (!wide_) {
            violations = count_all();
            if (windows_matter()) violations -= correct();
        } else if (!a_.reference_ties) {
            std::memset(counts_, 0, sizeof(uint32_t) * layout_.pairs);
            violations = count_beyond(a_.min_gap, false);
        } else {
            // Later ties are in, pairs beyond the gap are in, what lies between is not.
            violations = count_all();
            violations -= count_beyond(0, true);
            violations += count_beyond(a_.min_gap, false);
        }
        const double pairs = static_cast<double>(layout_.pairs), of = pairs * (pairs - 1) / 2;
        // The counts sum to 0, so that any origin will do; one among the scores leaves the least to cancel.
        const double origin = steps_.score(records_, layout_.pairs / 2);
        each(layout_.slots, a_.batch, [&](int64_t row, int) {
            rows_[row] = steps_.finish(student_, a_.batch, row, rank_, counts_, origin, 1 / of, gradient_);
        });
        double sum = 0, lost = 0;
        for (int64_t row = 0; row < a_.batch; ++row) {
            const double next = sum + rows_[row];
            lost += std::abs(sum) >= std::abs(rows_[row]) ? (sum - next) + rows_[row] : (rows_[row] - next) + sum;
            sum = next;
        }
        return (a_.margin * static_cast<double>(violations) + sum + lost) / of;
    }

    int64_t correct() {
        clear_sums();
        // More parts than threads: ties may lie together.
        const int64_t parts = 16 * layout_.slots;
        each(layout_.slots, parts, [&](int64_t index, int slot) {
            sums_[slot].value +=
                steps_.correct(student_, a_.teacher, order_, window_, layout_.pairs * index / parts,
                               layout_.pairs * (index + 1) / parts, a_.margin, a_.reference_ties, counts_);
        });
        return sum_of_slots();
    }

    // C - H of all pairs by t rank into counts_; returns the sum of C.
    int64_t count_all() {
        return count(true, true, nullptr, false);
    }

    // Adds, or takes away, C - H over what differs in T by more than `gap`; one side at a time, to save memory.
    int64_t count_beyond(double gap, bool negative) {
        int64_t violations = 0;
        for (const bool lower : {false, true}) {
            each(layout_.slots, layout_.slots, [&](int64_t index, int) {
                const auto [begin, end] = part(index);
                steps_.wide_windows(a_.teacher, order_, layout_.pairs, begin, end, gap, lower, window_);
            });
            violations += count(!lower, lower, window_, negative);
        }
        return violations;
    }

    int64_t count(bool low, bool high, const uint32_t* window, bool negative) {
        const int64_t queries = layout_.pairs * (low + high);
        Scan scan{records_, layout_.pairs, layout_.buckets, a_.margin, window, {}};
        unsigned char* at = spare_;
        scan.streams.events = reinterpret_cast<uint16_t*>(at);
        at += aligned(sizeof(uint16_t) * (layout_.pairs + queries));
        scan.streams.values = reinterpret_cast<uint32_t*>(at);
        // One more than there are: insertions at the end of the last bucket read it.
        at += aligned(sizeof(uint32_t) * (queries + 1));
        scan.streams.asking = window ? reinterpret_cast<uint32_t*>(at) : nullptr;

        split(low, high);
        each(layout_.slots, layout_.chunks, [&](int64_t index, int) {
            steps_.count(scan, chunks_[index], shares_ + index * layout_.buckets);
        });
        const Share last = total_shares();
        clear_sums();
        each(layout_.slots, layout_.chunks, [&](int64_t index, int slot) {
            sums_[slot].value += steps_.scan(scan, chunks_[index], shares_ + index * layout_.buckets,
                                             scratch_ + slot * layout_.scratch);
        });
        each(layout_.slots, layout_.buckets, [&](int64_t index, int slot) {
            // After the scan the first chunk's shares still say where each bucket begins.
            const Share first = shares_[index], next = index + 1 < layout_.buckets ? shares_[index + 1] : last;
            const int64_t events = next.events - first.events;
            if (window) {
                sums_[slot].value -=
                    kernels_.wide_bucket(scan.streams, events, first.events, first.queries, negative, counts_);
            } else {
                uint32_t* counts = counts_ + index * kBucket;
                std::memset(counts, 0, sizeof(uint32_t) * std::min<int64_t>(kBucket, layout_.pairs - index * kBucket));
                sums_[slot].value -= kernels_.bucket(scan.streams, events, first.events, first.queries, counts);
            }
        });
        return sum_of_slots();
    }

    // Chunks of equal numbers of insertions, each with the queries that come up among them.
    void split(bool low, bool high) {
        for (int64_t index = 0; index < layout_.chunks; ++index) {
            const int64_t begin = index * layout_.chunk;
            Chunk& chunk = chunks_[index];
            chunk = {begin, std::min(begin + layout_.chunk, layout_.pairs), 0, 0, 0, 0};
            chunk.low_begin = low ? steps_.first_low(records_, layout_.pairs, a_.margin, begin) : 0;
            chunk.high_begin = high ? steps_.first_high(records_, layout_.pairs, a_.margin, begin) : 0;
            if (index > 0) chunks_[index - 1].low_end = chunk.low_begin;
            if (index > 0) chunks_[index - 1].high_end = chunk.high_begin;
        }
        chunks_[layout_.chunks - 1].low_end = low ? layout_.pairs : 0;
        chunks_[layout_.chunks - 1].high_end = high ? layout_.pairs : 0;
    }

    // Counts -> what earlier chunks inserted in the bucket, and where the chunk writes; returns the totals.
    Share total_shares() {
        Share next{0, 0, 0};
        for (int64_t bucket = 0; bucket < layout_.buckets; ++bucket) {
            next.inserted = 0;
            for (int64_t chunk = 0; chunk < layout_.chunks; ++chunk) {
                Share& share = shares_[chunk * layout_.buckets + bucket];
                const Share counted = share;
                share = next;
                next.inserted += counted.inserted;
                next.events += counted.events;
                next.queries += counted.queries;
            }
        }
        return next;
    }

    struct alignas(64) Sum {
        int64_t value;
    };

    const RelativeKernels& kernels_;
    const RelativeSteps& steps_;
    const RelativeArguments& a_;
    const Layout layout_;
    uint32_t *rank_, *order_, *window_, *counts_;
    unsigned char *records_, *spare_, *scratch_;
    uint32_t* histograms_;
    Share* shares_;
    Chunk* chunks_;
    double* rows_;
    const unsigned char* student_ = nullptr;
    unsigned char* gradient_ = nullptr;
    bool wide_ = false;
    Sum sums_[kMaxSlots];
};

}  // namespace

size_t relative_workspace(const RelativeKernels& kernels, const RelativeArguments& arguments) {
    return Layout(kernels, arguments).total();
}

void relative(const RelativeKernels& kernels, const RelativeArguments& arguments, unsigned char* workspace) {
    // Memory that is likely fresh: the sorts and streams write all over it.
    advise_huge(workspace, relative_workspace(kernels, arguments));
    const size_t score = arguments.is_double ? sizeof(double) : sizeof(float);
    if (arguments.gradient)
        advise_huge(arguments.gradient, score * arguments.batch * arguments.batch * arguments.widths);
    Relative(kernels, arguments, workspace).run();
}

}  // namespace leafkern

// Blocks of queries, threads and the final merge; the kernels stand in cpu.inl.
#include "retrieval/search.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "common/pool.h"
#include "retrieval/keys.h"

namespace leafkern {
namespace {

constexpr size_t kQueryBytes = 384 << 10;     // packed queries stay in the second-level cache
constexpr int64_t kMostQueries = 512;         // of a block: 32 MB of keys per thread, where k is kMaxK
constexpr int64_t kChunkBytes = 4 << 20;      // of base, claimed by a thread at a time: shorter streams are slower
constexpr int64_t kThreadWork = 1 << 20;      // bytes of base times queries below which a thread is not worth waking
constexpr int64_t kGap = 64;                  // rows of which none is allowed that are worth passing over

bool is_float(Form form) { return form == Form::float32 || form == Form::float16; }

const FormKernels& form_of(const SearchKernels& kernels, const SearchArguments& a) {
    return kernels.forms[static_cast<int>(a.form)];
}

struct Layout {
    int64_t row;    // bytes that a kernel may read of one
    int64_t block;  // queries at a time
    int slots;
    int64_t tail;  // rows at the end of the base of which a kernel would read beyond the buffer
    size_t packed, scratch, tail_rows, keys, numbers;

    Layout(const SearchKernels& kernels, const SearchArguments& a) {
        const FormKernels& form = form_of(kernels, a);
        row = form.row_bytes(a.dim);
        const int64_t excess = row - form.stored_bytes(a.dim);
        tail = std::min(a.count, (excess + a.stride - 1) / std::max<int64_t>(a.stride, 1));
        const int64_t work = a.count * row * std::max<int64_t>(a.queries, 1);
        slots = static_cast<int>(std::clamp<int64_t>(work / kThreadWork, 1, std::max(a.threads, 1)));
        const int64_t query_bytes = form.packed_size(a.dim, 64) / 64;
        // Of D and the number of queries alone: float scores depend on how many queries are scored together.
        block = std::clamp<int64_t>(kQueryBytes / query_bytes / 16 * 16, 16, kMostQueries);
        block = std::max<int64_t>(1, std::min(block, a.queries));
        packed = aligned(form.packed_size(a.dim, static_cast<int>(block)));
        scratch = aligned(form.scratch_size(a.dim, static_cast<int>(block)));
        tail_rows = aligned(tail * row);
        keys = aligned(sizeof(int64_t) * a.k * block * slots);
        numbers = aligned(sizeof(int32_t) * block * slots);
    }
    size_t total() const { return packed + scratch * slots + tail_rows + keys + 2 * numbers; }
};

struct Pass {
    const FormKernels& form;
    const SearchArguments& a;
    const Layout& layout;
    unsigned char *packed, *scratch, *tail_rows;
    int64_t* keys;
    int32_t *counts, *thresholds;
    int64_t first_query;
    int queries;
    int64_t chunk;
    std::atomic<bool> finite{true};

    Keeper keeper(int slot) const {
        const int64_t first = slot * layout.block;
        return {keys + first * a.k, counts + first, thresholds + first, a.k, a.allowed};
    }

    // Offers rows [begin, end) of those at `rows`, which are numbered from `first` on.
    void offer(const uint8_t* rows, int64_t stride, int64_t first, int64_t begin, int64_t end, Keeper* kept,
               unsigned char* space) const {
        while (begin < end) {
            int64_t stop = end;
            if (a.allowed != nullptr) {
                const uint8_t* allowed = a.allowed + first;
                const auto none = [&](int64_t from, int64_t to) {
                    static constexpr uint8_t kNone[kGap] = {};
                    return std::memcmp(allowed + from, kNone, to - from) == 0;
                };
                while (begin < end && none(begin, std::min(begin + kGap, end))) begin = std::min(begin + kGap, end);
                for (stop = begin; stop < end && !none(stop, std::min(stop + kGap, end));)
                    stop = std::min(stop + kGap, end);
            }
            if (begin < stop)
                form.scan(a.dim, packed, queries, rows + begin * stride, stride, stop - begin, first + begin, kept,
                          space);
            begin = stop;
        }
    }

    void scan(int64_t index, int slot) {
        Keeper kept = keeper(slot);
        unsigned char* space = scratch + slot * layout.scratch;
        const int64_t direct = a.count - layout.tail, end = std::min((index + 1) * chunk, direct);
        offer(a.rows, a.stride, 0, index * chunk, end, &kept, space);
        if (end == direct) offer(tail_rows, layout.row, direct, 0, layout.tail, &kept, space);
        if (!kept.finite) finite.store(false, std::memory_order_relaxed);
    }

    // I = zero + factor*S.
    int64_t factor() const { return a.form == Form::hamming || a.form == Form::bits ? 2 : 1; }
    int64_t zero(int64_t query) const {
        if (a.form == Form::hamming) return -a.dim;
        if (is_float(a.form)) return 0;
        int64_t sum = 0, sizes = 0;
        for (int d = 0; d < a.dim; ++d) {
            const int u = static_cast<const int8_t*>(a.given)[query * a.dim + d];
            sum += u;
            sizes += std::abs(u);
        }
        return a.form == Form::bits ? -sizes : (a.form == Form::int8 ? -128 : -8) * sum;
    }

    void merge(int64_t query) const {
        // All slots' keys are gathered into slot 0's place.
        int64_t* best = keeper(0).keys + query * a.k;
        int64_t kept = counts[query];
        std::sort(best, best + kept, std::greater<int64_t>());
        for (int slot = 1; slot < layout.slots; ++slot) {
            const Keeper other = keeper(slot);
            int64_t* keys_of = other.keys + query * a.k;
            const int64_t more = other.counts[query];
            std::sort(keys_of, keys_of + more, std::greater<int64_t>());
            kept = merge_into(best, kept, keys_of, more);
        }
        const int64_t row = first_query + query, add = zero(row);
        const int32_t none = is_float(a.form) ? kNoFloat : INT_MIN;
        for (int64_t place = 0; place < a.k; ++place) {
            const bool found = place < kept;
            a.scores[row * a.k + place] = found ? final_score(add, best[place]) : none;
            a.ids[row * a.k + place] = found ? id_of_key(best[place]) : -1;
        }
    }

    int32_t final_score(int64_t zero, int64_t key) const {
        return is_float(a.form) ? float_of_key(key) : static_cast<int32_t>(zero + factor() * (key >> 32));
    }

    // Merges two falling runs into the first's place, keeping k.
    int64_t merge_into(int64_t* best, int64_t kept, const int64_t* more, int64_t count) const {
        const int64_t total = std::min<int64_t>(kept + count, a.k);
        // How many of each run are among the `total` best.
        int64_t left = 0, right = 0;
        while (left + right < total) (right >= count || (left < kept && best[left] > more[right])) ? ++left : ++right;
        for (int64_t place = total; place-- > 0;) {
            const bool from_left = right == 0 || (left > 0 && best[left - 1] < more[right - 1]);
            best[place] = from_left ? best[--left] : more[--right];
        }
        return total;
    }
};

}  // namespace

size_t search_workspace(const SearchKernels& kernels, const SearchArguments& a) { return Layout(kernels, a).total(); }

bool search(const SearchKernels& kernels, const SearchArguments& a, unsigned char* workspace) {
    const Layout layout(kernels, a);
    Pass pass{form_of(kernels, a), a, layout, workspace, workspace + layout.packed,
              nullptr, nullptr, nullptr, nullptr, 0, 0, 0};
    pass.tail_rows = pass.scratch + layout.scratch * layout.slots;
    pass.keys = reinterpret_cast<int64_t*>(pass.tail_rows + layout.tail_rows);
    pass.counts = reinterpret_cast<int32_t*>(reinterpret_cast<unsigned char*>(pass.keys) + layout.keys);
    pass.thresholds = reinterpret_cast<int32_t*>(reinterpret_cast<unsigned char*>(pass.counts) + layout.numbers);
    const int64_t row = layout.row, stored = pass.form.stored_bytes(a.dim);
    const int64_t direct = a.count - layout.tail;
    std::memset(pass.tail_rows, 0, layout.tail_rows);
    for (int64_t i = 0; i < layout.tail; ++i)
        std::memcpy(pass.tail_rows + i * row, a.rows + (direct + i) * a.stride, stored);
    // Whole blocks of 128 rows, which bits are looked up in.
    pass.chunk = std::clamp<int64_t>(direct / (8 * layout.slots), 1, std::max<int64_t>(kChunkBytes / row, 1));
    pass.chunk = (pass.chunk + 127) / 128 * 128;
    const int64_t chunks = std::max<int64_t>((direct + pass.chunk - 1) / pass.chunk, 1);
    const int64_t query_bytes = a.dim * (is_float(a.form) ? sizeof(float) : sizeof(int8_t));
    for (int64_t first = 0; first < a.queries; first += layout.block) {
        pass.first_query = first;
        pass.queries = static_cast<int>(std::min(layout.block, a.queries - first));
        const unsigned char* given = static_cast<const unsigned char*>(a.given) + first * query_bytes;
        pass.form.pack(a.dim, given, pass.queries, a.flip, pass.packed);
        std::fill_n(pass.counts, layout.block * layout.slots, 0);
        std::fill_n(pass.thresholds, layout.block * layout.slots, INT_MIN);
        parallel(
            layout.slots, chunks,
            [](void* context, int64_t index, int slot) { static_cast<Pass*>(context)->scan(index, slot); }, &pass);
        const int mergers = a.k * pass.queries > 4096 ? layout.slots : 1;
        parallel(
            mergers, pass.queries,
            [](void* context, int64_t index, int) { static_cast<Pass*>(context)->merge(index); }, &pass);
    }
    return pass.finite;
}

}  // namespace leafkern

// The steps of the relative similarity loss, compiled once per instruction set into namespace LEAFKERN_ISA. No
// templates or inline functions of the standard library here: the linker might keep this object's copy for every
// caller.
#include <cmath>
#include <cstring>

#include "relative/relative.h"

namespace leafkern {
namespace LEAFKERN_ISA {
namespace {

// ---- Keys: unsigned integers in the order of the scores

template <typename Score>
struct Bits;
template <>
struct Bits<float> {
    using Type = uint32_t;
};
template <>
struct Bits<double> {
    using Type = uint64_t;
};
template <typename Score>
using Key = typename Bits<Score>::Type;

#pragma pack(push, 4)
template <typename Score>
struct Record {
    Key<Score> key;
    uint32_t index;
};
#pragma pack(pop)

template <typename Score>
Key<Score> key_of(Score score) {
    constexpr int kSign = 8 * sizeof(Score) - 1;
    // -0 ties with +0.
    score += 0;
    Key<Score> bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits ^ ((0 - (bits >> kSign)) | static_cast<Key<Score>>(1) << kSign);
}

template <typename Score>
double value_of(Key<Score> key) {
    constexpr int kSign = 8 * sizeof(Score) - 1;
    const Key<Score> bits = key ^ (((key >> kSign) - 1) | static_cast<Key<Score>>(1) << kSign);
    Score score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
}

template <typename Score>
const Record<Score>* records_of(const void* records) {
    return static_cast<const Record<Score>*>(records);
}

template <typename Score>
double score(const void* records, int64_t index) {
    return value_of<Score>(records_of<Score>(records)[index].key);
}

// Whether the pair of scores is in the loss: the higher teacher score has `high`.
bool violated(double margin, double high, double low) { return margin - (high - low) > 0; }

int64_t first_pair(int64_t batch, int64_t row) { return row * (2 * batch - row - 1) / 2; }

template <typename Score>
bool load(const void* matrix, int64_t batch, int64_t begin, int64_t end, const uint32_t* rank, void* records) {
    bool finite = true;
    for (int64_t row = begin; row < end; ++row) {
        const Score* scores = static_cast<const Score*>(matrix) + row * batch;
        const int64_t first = first_pair(batch, row) - row - 1;
        for (int64_t column = row + 1; column < batch; ++column) {
            finite &= scores[column] - scores[column] == 0;
            const uint32_t index = rank ? rank[first + column] : static_cast<uint32_t>(row * batch + column);
            static_cast<Record<Score>*>(records)[first + column] = {key_of(scores[column]), index};
        }
    }
    return finite;
}

template <typename Score>
uint32_t digit_of(Key<Score> key, int digit) {
    return static_cast<uint32_t>(key >> (digit * kDigitBits)) & (kBins - 1);
}

template <typename Score>
void histogram(const void* records, int64_t begin, int64_t end, int digit, uint32_t* counts) {
    std::memset(counts, 0, kBins * sizeof(uint32_t));
    for (int64_t i = begin; i < end; ++i) ++counts[digit_of<Score>(records_of<Score>(records)[i].key, digit)];
}

template <typename Score>
void scatter(const void* records, int64_t begin, int64_t end, int digit, uint32_t* offsets, void* sorted) {
    for (int64_t i = begin; i < end; ++i) {
        const Record<Score> record = records_of<Score>(records)[i];
        static_cast<Record<Score>*>(sorted)[offsets[digit_of<Score>(record.key, digit)]++] = record;
    }
}

template <typename Score>
void invert(const void* records, int64_t batch, int64_t begin, int64_t end, uint32_t* rank, uint32_t* order) {
    for (int64_t t = begin; t < end; ++t) {
        const uint32_t place = records_of<Score>(records)[t].index;
        const uint32_t row = place / static_cast<uint32_t>(batch);
        order[t] = place;
        // The rows above and this one leave out 1 + 2 + ... + (row + 1) places of the matrix.
        rank[place - static_cast<uint32_t>((row + 1ll) * (row + 2ll) / 2)] = static_cast<uint32_t>(t);
    }
}

// ---- Windows of T

template <typename Score>
struct Sorted {
    const Record<Score>* records;
    double operator()(int64_t t) const { return value_of<Score>(records[t].key); }
};

template <typename Score>
struct Gathered {
    const Score* matrix;
    const uint32_t* order;
    double operator()(int64_t t) const { return matrix[order[t]]; }
};

// First place in [low, high) from which on `beyond` holds.
template <typename Predicate>
int64_t first_where(int64_t low, int64_t high, Predicate beyond) {
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (beyond(middle))
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

template <typename Teacher>
int64_t upper_windows(Teacher teacher, int64_t pairs, int64_t begin, int64_t end, double gap, uint32_t* window) {
    const double first = teacher(begin);
    int64_t place = first_where(begin + 1, pairs, [&](int64_t x) { return teacher(x) - first > gap; }), inside = 0;
    for (int64_t t = begin; t < end; ++t) {
        const double own = teacher(t);
        if (place <= t) place = t + 1;
        while (place < pairs && !(teacher(place) - own > gap)) ++place;
        window[t] = static_cast<uint32_t>(place);
        inside += place - t - 1;
    }
    return inside;
}

template <typename Teacher>
void lower_windows(Teacher teacher, int64_t begin, int64_t end, double gap, uint32_t* window) {
    const double first = teacher(begin);
    int64_t place = first_where(0, begin, [&](int64_t x) { return !(first - teacher(x) > gap); });
    for (int64_t t = begin; t < end; ++t) {
        const double own = teacher(t);
        while (own - teacher(place) > gap) ++place;
        window[t] = static_cast<uint32_t>(place);
    }
}

template <typename Score>
int64_t windows(const void* records, int64_t pairs, int64_t begin, int64_t end, double gap, uint32_t* window) {
    return upper_windows(Sorted<Score>{records_of<Score>(records)}, pairs, begin, end, gap, window);
}

template <typename Score>
void wide_windows(const void* matrix, const uint32_t* order, int64_t pairs, int64_t begin, int64_t end, double gap,
                  bool lower, uint32_t* window) {
    const Gathered<Score> teacher{static_cast<const Score*>(matrix), order};
    if (lower)
        lower_windows(teacher, begin, end, gap, window);
    else
        upper_windows(teacher, pairs, begin, end, gap, window);
}

template <typename Score>
int64_t correct(const void* student, const void* teacher, const uint32_t* order, const uint32_t* window, int64_t begin,
                int64_t end, double margin, bool keep_ties, uint32_t* counts) {
    const Score *s = static_cast<const Score*>(student), *t = static_cast<const Score*>(teacher);
    int64_t total = 0;
    for (int64_t i = begin; i < end; ++i) {
        if (window[i] == i + 1 && (i == 0 || window[i - 1] == i)) continue;
        uint32_t low = 0, high = 0;
        for (int64_t j = i + 1; j < window[i]; ++j)
            if (!(keep_ties && t[order[j]] == t[order[i]])) low += violated(margin, s[order[j]], s[order[i]]);
        for (int64_t j = i; j-- > 0 && window[j] > i;)
            if (!(keep_ties && t[order[j]] == t[order[i]])) high += violated(margin, s[order[i]], s[order[j]]);
        counts[i] += high - low;
        total += low;
    }
    return total;
}

// ---- The scan over the s order

template <typename Score>
int64_t first_low(const void* records, int64_t pairs, double margin, int64_t inserted) {
    if (inserted == 0) return 0;
    const double last = score<Score>(records, inserted - 1);
    return first_where(0, pairs, [&](int64_t x) { return violated(margin, last, score<Score>(records, x)); });
}

template <typename Score>
int64_t first_high(const void* records, int64_t pairs, double margin, int64_t inserted) {
    if (inserted == 0) return 0;
    const double last = score<Score>(records, inserted - 1);
    return first_where(0, pairs, [&](int64_t x) { return !violated(margin, score<Score>(records, x), last); });
}

template <typename Score>
void count(const Scan& scan, const Chunk& chunk, Share* shares) {
    const Record<Score>* records = records_of<Score>(scan.records);
    std::memset(shares, 0, scan.buckets * sizeof(Share));
    for (int64_t i = chunk.begin; i < chunk.end; ++i) ++shares[records[i].index >> kBucketBits].inserted;
    const int64_t sides[2][2] = {{chunk.low_begin, chunk.low_end}, {chunk.high_begin, chunk.high_end}};
    for (const auto& side : sides)
        for (int64_t i = side[0]; i < side[1]; ++i) {
            const uint32_t t = records[i].index;
            ++shares[(scan.window ? scan.window[t] : t) >> kBucketBits].queries;
        }
    for (int64_t b = 0; b < scan.buckets; ++b) shares[b].events = shares[b].inserted + shares[b].queries;
}

constexpr int kLanes = 16;

// Counters of 16 bits side by side, as one vector where the compiler has them.
void add_lanes(uint16_t* to, const uint16_t* from) {
#if defined(__GNUC__)
    typedef uint16_t Vector __attribute__((vector_size(2 * kLanes)));
    Vector a, b;
    std::memcpy(&a, to, sizeof a);
    std::memcpy(&b, from, sizeof b);
    a += b;
    std::memcpy(to, &a, sizeof a);
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint16_t>(to[i] + from[i]);
#endif
}

// Buckets in groups: a bucket's lower neighbours inside its group, and the groups below, are counted apart.
int group_bits_of(int64_t buckets) { return buckets <= 1024 ? 5 : buckets <= 4096 ? 6 : 7; }
int64_t padded_groups(int64_t buckets, int group_bits) {
    const int64_t groups = (buckets >> group_bits) + 1;
    return (groups + kLanes - 1) / kLanes * kLanes;
}

struct Cursor {
    uint32_t event, query;
};

size_t scratch_size(int64_t buckets) {
    const int bits = group_bits_of(buckets);
    const int64_t groups = padded_groups(buckets, bits);
    const size_t bytes = buckets * (sizeof(uint32_t) + sizeof(Cursor)) +
                         sizeof(uint16_t) * ((groups << bits) + 3 * groups + (2 << bits));
    return (bytes + 127) / 64 * 64;
}

template <int kGroupBits>
class Counters {
  public:
    Counters(const Scan& scan, const Share* shares, unsigned char* scratch)
        : groups_(padded_groups(scan.buckets, kGroupBits)),
          streams_(scan.streams),
          cursors_(reinterpret_cast<Cursor*>(scratch)),
          base_(reinterpret_cast<uint32_t*>(cursors_ + scan.buckets)),
          fine_(reinterpret_cast<uint16_t*>(base_ + scan.buckets)),
          coarse_(fine_ + (groups_ << kGroupBits)),
          coarse_ramp_(coarse_ + groups_),
          fine_ramp_(coarse_ramp_ + 2 * groups_) {
        uint32_t below = 0;
        for (int64_t b = 0; b < scan.buckets; ++b) {
            base_[b] = below;
            below += shares[b].inserted;
            cursors_[b] = {shares[b].events, shares[b].queries};
        }
        std::memset(fine_, 0, sizeof(uint16_t) * ((groups_ << kGroupBits) + groups_));
        // Steps from 0 to 1: read from the right place, they add 1 to all lanes above one.
        for (int64_t i = 0; i < 2 * groups_; ++i) coarse_ramp_[i] = i >= groups_;
        for (int i = 0; i < 2 * kGroup; ++i) fine_ramp_[i] = i >= kGroup;
    }

    void insert(uint32_t t) {
        const uint32_t bucket = t >> kBucketBits, group = bucket >> kGroupBits;
        uint16_t* fine = fine_ + (group << kGroupBits);
        const uint16_t* step = fine_ramp_ + kGroup - 1 - (bucket & (kGroup - 1));
        for (int i = 0; i < kGroup; i += kLanes) add_lanes(fine + i, step + i);
        step = coarse_ramp_ + groups_ - 1 - group;
        for (int64_t i = 0; i < groups_; i += kLanes) add_lanes(coarse_ + i, step + i);
        streams_.events[cursors_[bucket].event++] = static_cast<uint16_t>(t & (kBucket - 1));
    }

    // How many were inserted in lower buckets than that of t.
    uint32_t below(uint32_t t) const {
        const uint32_t bucket = t >> kBucketBits;
        return base_[bucket] + coarse_[bucket >> kGroupBits] + fine_[bucket];
    }

    void ask(uint32_t t, uint32_t kind, uint32_t value, uint32_t asking) {
        Cursor& cursor = cursors_[t >> kBucketBits];
        streams_.events[cursor.event++] = static_cast<uint16_t>(kind << 14 | (t & (kBucket - 1)));
        if (streams_.asking) streams_.asking[cursor.query] = asking;
        streams_.values[cursor.query++] = value;
    }

  private:
    static constexpr int kGroup = 1 << kGroupBits;
    const int64_t groups_;
    const Streams streams_;
    Cursor* cursors_;
    uint32_t* base_;
    uint16_t *fine_, *coarse_, *coarse_ramp_, *fine_ramp_;
};

// Walks over records. Scores are taken out one record ahead: what is compared next can't be foreseen, so that every
// other branch waits for it.
template <typename Score>
class Walk {
  public:
    Walk(const Scan& scan, int64_t begin, int64_t end)
        : records_(records_of<Score>(scan.records)), place_(begin), end_(end), last_(scan.pairs - 1) {
        score_ = at(begin);
        next_ = at(begin + 1);
    }
    bool more() const { return place_ < end_; }
    int64_t place() const { return place_; }
    double score() const { return score_; }
    // The index of the record, leaving it.
    uint32_t take() {
        const uint32_t index = records_[place_++].index;
        score_ = next_;
        next_ = at(place_ + 1);
        return index;
    }

  private:
    double at(int64_t place) const { return value_of<Score>(records_[place < last_ ? place : last_].key); }
    const Record<Score>* records_;
    int64_t place_;
    const int64_t end_, last_;
    double score_, next_;
};

template <typename Score, int kGroupBits>
int64_t scan_groups(const Scan& scan, const Chunk& chunk, const Share* shares, unsigned char* scratch) {
    const double margin = scan.margin;
    Counters<kGroupBits> counters(scan, shares, scratch);
    Walk<Score> own(scan, chunk.begin, chunk.end);
    Walk<Score> low(scan, chunk.low_begin, chunk.low_end), high(scan, chunk.high_begin, chunk.high_end);
    int64_t total = 0;

    const auto ask_low = [&] {
        const uint32_t asking = low.take(), t = scan.window ? scan.window[asking] : asking;
        const uint32_t value = static_cast<uint32_t>(own.place()) - counters.below(t);
        total += value;
        counters.ask(t, 1, value, asking);
    };
    const auto ask_high = [&] {
        const uint32_t asking = high.take(), t = scan.window ? scan.window[asking] : asking;
        counters.ask(t, 2, counters.below(t) - t, asking);
    };
    while (own.more()) {
        while (low.more() && !violated(margin, own.score(), low.score())) ask_low();
        while (high.more() && violated(margin, high.score(), own.score())) ask_high();
        counters.insert(own.take());
    }
    while (low.more()) ask_low();
    while (high.more()) ask_high();
    return total;
}

template <typename Score>
int64_t scan(const Scan& scan, const Chunk& chunk, const Share* shares, unsigned char* scratch) {
    switch (group_bits_of(scan.buckets)) {
        case 5: return scan_groups<Score, 5>(scan, chunk, shares, scratch);
        case 6: return scan_groups<Score, 6>(scan, chunk, shares, scratch);
        default: return scan_groups<Score, 7>(scan, chunk, shares, scratch);
    }
}

// ---- Inside a bucket: a bit per t rank, and how many bits are set in lower words

constexpr int kWords = kBucket / 64;

uint32_t popcount(uint64_t word) {
#if defined(__POPCNT__)
    return static_cast<uint32_t>(__builtin_popcountll(word));
#else
    word -= word >> 1 & 0x5555555555555555;
    word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F;
    return static_cast<uint32_t>(word * 0x0101010101010101 >> 56);
#endif
}

class Bitmap {
  public:
    Bitmap() {
        for (int i = 0; i < 2 * kWords; ++i) ramp_[i] = i >= kWords;
    }

    // Bits set below `place`, and at it if `itself` is 1.
    uint32_t below(uint32_t place, uint32_t itself) const {
        const uint64_t mask = (static_cast<uint64_t>(1) << (place & 63) << itself) - 1;
        return popcount(words_[place >> 6] & mask) + prefix_[place >> 6];
    }

    // Sets the bit if `yes` is 1; nothing if it is 0: without a branch, which would be a guess.
    void insert(uint32_t place, uint32_t yes) {
        words_[place >> 6] |= static_cast<uint64_t>(yes) << (place & 63);
        const uint16_t* step = ramp_ + ((kWords - 1 - (place >> 6)) & (0 - yes));
#if defined(__GNUC__)
        // The sums stay in registers; memory only serves to pick a lane.
        for (int i = 0; i < kVectors; ++i) {
            Vector more;
            std::memcpy(&more, step + i * kLanes, sizeof more);
            sums_[i] += more;
            std::memcpy(prefix_ + i * kLanes, &sums_[i], sizeof more);
        }
#else
        for (int i = 0; i < kWords; i += kLanes) add_lanes(prefix_ + i, step + i);
#endif
    }

  private:
#if defined(__GNUC__)
    static constexpr int kVectors = kWords / kLanes;
    typedef uint16_t Vector __attribute__((vector_size(2 * kLanes)));
    Vector sums_[kVectors] = {};
#endif
    alignas(64) uint64_t words_[kWords] = {};
    alignas(64) uint16_t prefix_[kWords] = {};
    alignas(64) uint16_t ramp_[2 * kWords];
};

int64_t bucket(const Streams& streams, int64_t events, int64_t event, int64_t query, uint32_t* counts) {
    Bitmap bits;
    uint64_t total = 0;
    const uint16_t* from = streams.events + event;
    const uint32_t* values = streams.values + query;
    for (int64_t i = 0; i < events; ++i) {
        const uint32_t kind = from[i] >> 14, place = from[i] & (kBucket - 1);
        const uint32_t low = kind & 1, asks = low | kind >> 1;
        const uint32_t found = bits.below(place, low);
        // Low: value - found; high: value + found. An insertion reads the next query's value and adds nothing.
        counts[place] += (*values + ((found ^ (0 - low)) + low)) & (0 - asks);
        total += found & (0 - low);
        values += asks;
        bits.insert(place, asks ^ 1);
    }
    return static_cast<int64_t>(total);
}

int64_t wide_bucket(const Streams& streams, int64_t events, int64_t event, int64_t query, bool negative,
                    uint32_t* counts) {
    Bitmap bits;
    int64_t total = 0;
    for (int64_t i = event; i < event + events; ++i) {
        const uint32_t kind = streams.events[i] >> 14, place = streams.events[i] & (kBucket - 1);
        if (kind == 0) {
            bits.insert(place, 1);
            continue;
        }
        const uint32_t found = bits.below(place, 0), value = streams.values[query];
        const uint32_t more = kind == 1 ? value - found : value + found;
        counts[streams.asking[query++]] += negative ? 0 - more : more;
        total += kind == 1 ? found : 0;
    }
    return total;
}

// ---- The result

template <typename Score>
double finish(const void* student, int64_t batch, int64_t row, const uint32_t* rank, const uint32_t* counts,
              double origin, double scale, void* gradient) {
    const Score* scores = static_cast<const Score*>(student) + row * batch;
    const int64_t first = first_pair(batch, row) - row - 1;
    double sums[4] = {0, 0, 0, 0};
    if (gradient == nullptr) {
        for (int64_t column = row + 1; column < batch; ++column)
            sums[column & 3] += (scores[column] - origin) * static_cast<int32_t>(counts[rank[first + column]]);
    } else {
        Score* to = static_cast<Score*>(gradient) + row * batch;
        std::memset(to, 0, (row + 1) * sizeof(Score));
        for (int64_t column = row + 1; column < batch; ++column) {
            const double violations = static_cast<int32_t>(counts[rank[first + column]]);
            sums[column & 3] += (scores[column] - origin) * violations;
            to[column] = static_cast<Score>(violations * scale);
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <typename Score>
void fill_nan(int64_t batch, int64_t row, void* gradient) {
    Score* to = static_cast<Score*>(gradient) + row * batch;
    std::memset(to, 0, (row + 1) * sizeof(Score));
    for (int64_t column = row + 1; column < batch; ++column) to[column] = static_cast<Score>(NAN);
}

template <typename Score>
constexpr RelativeSteps steps() {
    return {sizeof(Record<Score>),
            (8 * static_cast<int>(sizeof(Score)) + kDigitBits - 1) / kDigitBits,
            load<Score>,
            histogram<Score>,
            scatter<Score>,
            invert<Score>,
            windows<Score>,
            wide_windows<Score>,
            first_low<Score>,
            first_high<Score>,
            count<Score>,
            scan<Score>,
            correct<Score>,
            finish<Score>,
            fill_nan<Score>,
            score<Score>};
}

#define LEAFKERN_TEXT_(x) #x
#define LEAFKERN_TEXT(x) LEAFKERN_TEXT_(x)

}  // namespace

extern const RelativeKernels relative_kernels;
const RelativeKernels relative_kernels = {
    LEAFKERN_TEXT(LEAFKERN_ISA), {steps<float>(), steps<double>()}, scratch_size, bucket, wide_bucket};

}  // namespace LEAFKERN_ISA
}  // namespace leafkern

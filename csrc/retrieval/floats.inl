// float32 and float16 bases: scores are float sums, compared as float and kept by their bits, which order as integers.
// All scores of a query are added up in the same order: equal rows score equally, wherever they stand. Few queries:
// rows are streamed once, memory sets the pace. More: panels of 16 or 8 queries, one entry of each query side by side,
// times rows whose entries are broadcast; the sums of a tile stay in registers for up to kDepth dimensions.

#include "common/half.inl"

constexpr int kStreamed = 8;           // most queries whose rows are streamed, and
constexpr int kStreamedFloats = 4096;  // most of their entries, which then stay in the first-level cache
constexpr int kPanel = 16;             // queries of a panel; 8 where no more are left
constexpr int kFloatBytes = 64 << 10;  // of rows that all panels pass over, kept in the second-level cache
constexpr int kFloatRows = 240;        // most of them
constexpr int kTileRows = 24;          // a multiple of the rows of each register tile
constexpr int kDepth = 256;            // dimensions of a panel at a time, kept in the first-level cache
constexpr float kLargest = 3.402823466e38f;

// ---- Eight floats.

#if defined(__AVX2__)
using Eight = __m256;
inline Eight eight(float x) { return _mm256_set1_ps(x); }
inline Eight load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(Eight x, float* to) { _mm256_storeu_ps(to, x); }
inline Eight add(Eight a, Eight b) { return _mm256_add_ps(a, b); }
inline Eight multiply_add(Eight a, Eight b, Eight sum) { return _mm256_fmadd_ps(a, b, sum); }
// A bit per lane that is above the limit, or NaN, or has NaN for a limit.
inline int above(Eight x, Eight limit) { return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_NLE_UQ)); }
#else
struct Eight {
    float lanes[8];
};
inline Eight load(const float* x) {
    Eight found;
    std::memcpy(found.lanes, x, sizeof(found.lanes));
    return found;
}
inline void store(const Eight& x, float* to) { std::memcpy(to, x.lanes, sizeof(x.lanes)); }
template <typename Operation>
inline Eight each_lane(Operation operation) {
    Eight found;
    for (int i = 0; i < 8; ++i) found.lanes[i] = operation(i);
    return found;
}
inline Eight eight(float x) {
    return each_lane([&](int) { return x; });
}
inline Eight add(const Eight& a, const Eight& b) {
    return each_lane([&](int i) { return a.lanes[i] + b.lanes[i]; });
}
inline Eight multiply_add(const Eight& a, const Eight& b, const Eight& sum) {
    return each_lane([&](int i) { return a.lanes[i] * b.lanes[i] + sum.lanes[i]; });
}
inline int above(const Eight& x, const Eight& limit) {
    int bits = 0;
    for (int i = 0; i < 8; ++i) bits |= !(x.lanes[i] <= limit.lanes[i]) << i;
    return bits;
}
#endif

// Signed bytes, as the codes of a level that rescores.
struct Whole8 {
    using Stored = int8_t;
    static constexpr bool kHalf = false;
    static float value(int8_t x) { return x; }
};

template <class Type>
inline Eight load_as_floats(const typename Type::Stored* x) {
    float space[8];
#if defined(__AVX2__)
    if constexpr (Type::kHalf) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#endif
    return load(floats_of<Type>(x, 1, 8, space));
}

inline float sum_of(Eight x) {
    float lanes[8];
    store(x, lanes);
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// ---- Scores and keys.

// A float's bits as an integer that orders as it does, and back.
int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

// What scores of a query must be above; NaN, which none is at most, while fewer than k are kept.
float limit_of(const Keeper* keeper, int query) {
    return float_of(static_cast<uint32_t>(ordered(keeper->thresholds[query])));
}

// Whether a score is worth offering: above its limit, or not finite; -infinity alone would never be selected.
inline bool notable(float score, float limit) { return !(score <= limit) || score < -kLargest; }

// A score that is.
void offer(Keeper* keeper, int query, float score, int64_t id) {
    if (keeper->allowed != nullptr && !keeper->allowed[id]) return;
    const uint32_t bits = bits_of(score + 0.f);  // -0 becomes 0
    if ((bits & 0x7F800000) == 0x7F800000)
        keeper->finite = false;
    else
        keep(keeper, query, ordered(static_cast<int32_t>(bits)), id);
}

// ---- Few queries: their entries, zeros up to a multiple of 8, query after query.

int padded(int dim) { return (dim + 7) / 8 * 8; }

bool streamed(int dim, int queries) {
    return queries == 1 || (queries <= kStreamed && queries * padded(dim) <= kStreamedFloats);
}

template <class Type, int Q>
void scan_streamed(int dim, const float* queries, const uint8_t* rows, int64_t stride, int64_t count, int64_t first_id,
                   Keeper* keeper) {
    using Stored = typename Type::Stored;
    constexpr int kSums = Q <= 3 ? 4 : Q <= 6 ? 2 : 1;  // of each score: enough to hide the latency of multiply_add
    const int width = padded(dim);
    const float bias = keeper->bias;
    float limits[Q];
    for (int q = 0; q < Q; ++q) limits[q] = limit_of(keeper, q);
    for (int64_t row = 0; row < count; ++row) {
        if (keeper->allowed != nullptr && !keeper->allowed[first_id + row]) continue;
        const Stored* x = reinterpret_cast<const Stored*>(rows + row * stride);
        Eight sums[Q][kSums];
        for (int q = 0; q < Q; ++q)
            for (int s = 0; s < kSums; ++s) sums[q][s] = eight(0);
        const auto step = [&](int d, int s, Eight values) {
            for (int q = 0; q < Q; ++q) sums[q][s] = multiply_add(values, load(queries + q * width + d), sums[q][s]);
        };
        int d = 0;
        for (; d + 8 * kSums <= dim; d += 8 * kSums)
#pragma GCC unroll 4
            for (int s = 0; s < kSums; ++s) step(d + 8 * s, s, load_as_floats<Type>(x + d + 8 * s));
        for (; d + 8 <= dim; d += 8) step(d, 0, load_as_floats<Type>(x + d));
        if (d < dim) {
            Stored rest[8] = {};
            std::memcpy(rest, x + d, sizeof(Stored) * (dim - d));
            step(d, kSums - 1, load_as_floats<Type>(rest));
        }
        for (int q = 0; q < Q; ++q) {
            for (int s = 1; s < kSums; ++s) sums[q][0] = add(sums[q][0], sums[q][s]);
            const float score = sum_of(sums[q][0]) + bias;
            if (notable(score, limits[q])) {
                offer(keeper, q, score, first_id + row);
                limits[q] = limit_of(keeper, q);
            }
        }
    }
}

// ---- More: panels (dim, 8*W) of queries, zeros beyond the last.

// The rows after these, asked for while these are multiplied: `lines` cache lines with each register tile.
struct Ahead {
    const uint8_t* at;
    int64_t lines;
    void step() {
#if defined(__AVX2__)
        for (int64_t i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(at + 64 * i), _MM_HINT_T1);
        at += 64 * lines;
#endif
    }
};

// Adds to R rows of sums (R, 8*W) the products of R rows of floats and a panel over `depth` dimensions.
template <int W, int R>
inline void multiply_rows(int64_t depth, const float* panel, const float* const (&rows)[R], Eight (&sums)[R][W]) {
    for (int64_t d = 0; d < depth; ++d, panel += 8 * W) {
        Eight entries[W];
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) entries[w] = load(panel + 8 * w);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Eight entry = eight(rows[r][d]);
#pragma GCC unroll 2
            for (int w = 0; w < W; ++w) sums[r][w] = multiply_add(entry, entries[w], sums[r][w]);
        }
    }
}

// Offers the scores of all rows, at most kFloatRows, with the queries of one panel.
template <int W, int R>
void scan_panel(int dim, const float* panel, int query, int queries, const float* rows, int64_t stride, int64_t count,
                int64_t first_id, Ahead* ahead, Keeper* keeper) {
    constexpr int kWide = 8 * W;
    float partial[kFloatRows * kWide];
    Eight limits[W];
    const auto refresh = [&] {
        float values[kWide];
        for (int q = 0; q < kWide; ++q) values[q] = q < queries ? limit_of(keeper, query + q) : kLargest;
        for (int w = 0; w < W; ++w) limits[w] = load(values + 8 * w);
    };
    refresh();
    const int64_t parts = (dim + kDepth - 1) / kDepth;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = dim * part / parts, end = dim * (part + 1) / parts;
        for (int64_t row = 0; row < count; row += R) {
            // Where fewer rows are left, the last is repeated.
            const float* x[R];
            for (int r = 0; r < R; ++r) x[r] = rows + least(row + r, count - 1) * stride + begin;
            ahead->step();
            Eight sums[R][W];
            float* kept = partial + row * kWide;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int w = 0; w < W; ++w) sums[r][w] = part == 0 ? eight(0) : load(kept + r * kWide + 8 * w);
            multiply_rows<W, R>(end - begin, panel + begin * kWide, x, sums);
            int better = 0;
            if (part + 1 == parts) {
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                    for (int w = 0; w < W; ++w)
                        better |= above(sums[r][w], limits[w]) | above(eight(-kLargest), sums[r][w]);
                if (!better) continue;
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int w = 0; w < W; ++w) store(sums[r][w], kept + r * kWide + 8 * w);
            if (!better) continue;
            for (int r = 0; r < least<int64_t>(R, count - row); ++r)
                for (int q = 0; q < queries; ++q) {
                    const float score = kept[r * kWide + q];
                    if (notable(score, limit_of(keeper, query + q)))
                        offer(keeper, query + q, score, first_id + row + r);
                }
            refresh();
        }
    }
}

// Rows that all panels pass over at a time.
int float_rows(int dim) {
    const int fitting = least(kFloatBytes / static_cast<int>(sizeof(float)) / dim, kFloatRows) / kTileRows * kTileRows;
    return fitting < kTileRows ? kTileRows : fitting;
}

template <class Type>
void scan_panels(int dim, const float* packed, int queries, const uint8_t* rows, int64_t stride, int64_t count,
                 int64_t first_id, Keeper* keeper, float* scratch) {
    using Stored = typename Type::Stored;
    const int64_t block = float_rows(dim);
    // Register tiles in a block of six rows and sixteen queries each, once for each part of the dimensions.
    const int64_t tiles = block / 6 * ((queries + kPanel - 1) / kPanel) * ((dim + kDepth - 1) / kDepth);
    for (int64_t begin = 0; begin < count; begin += block) {
        const int64_t now = least(block, count - begin);
        const uint8_t* here = rows + begin * stride;
        const float* values = reinterpret_cast<const float*>(here);
        int64_t width = stride / sizeof(float);
        if (sizeof(Stored) < sizeof(float)) {
            for (int64_t row = 0; row < now; ++row)
                floats_of<Type>(reinterpret_cast<const Stored*>(here + row * stride), 1, dim, scratch + row * dim);
            values = scratch;
            width = dim;
        }
        const int64_t next = least(block, count - begin - now) * stride / 64;
        Ahead ahead{here + now * stride, (next + tiles - 1) / tiles};
        for (int query = 0; query < queries; query += kPanel) {
            const float* panel = packed + static_cast<int64_t>(query) * dim;
            const int left = least(queries - query, kPanel);
            const auto scan = left > 8 ? scan_panel<2, 6> : scan_panel<1, 8>;
            scan(dim, panel, query, left, values, width, now, first_id + begin, &ahead, keeper);
        }
    }
}

// ---- The functions of these forms.

template <class Type>
int64_t float_row_bytes(int dim) {
    return static_cast<int64_t>(dim) * sizeof(typename Type::Stored);
}

size_t float_packed_size(int dim, int queries) {
    return aligned(sizeof(float) * ((queries + 7) / 8 * 8) * padded(dim));
}

template <class Type>
size_t float_scratch_size(int dim, int queries) {
    const bool converted = sizeof(typename Type::Stored) < sizeof(float) && !streamed(dim, queries);
    return converted ? aligned(sizeof(float) * float_rows(dim) * dim) : 0;
}

void pack_floats(int dim, const void* given, int queries, uint8_t, unsigned char* packed) {
    const float* from = static_cast<const float*>(given);
    float* to = reinterpret_cast<float*>(packed);
    std::memset(packed, 0, float_packed_size(dim, queries));
    for (int64_t q = 0; q < queries; ++q, from += dim) {
        if (streamed(dim, queries)) {
            std::memcpy(to + q * padded(dim), from, sizeof(float) * dim);
            continue;
        }
        const int64_t first = q / kPanel * kPanel, wide = queries - first > 8 ? kPanel : 8;
        for (int d = 0; d < dim; ++d) to[first * dim + d * wide + q - first] = from[d];
    }
}

template <class Type>
void scan_floats(int dim, const unsigned char* packed, int queries, const uint8_t* rows, int64_t stride,
                 int64_t count, int64_t first_id, Keeper* keeper, unsigned char* scratch) {
    const float* values = reinterpret_cast<const float*>(packed);
    if (!streamed(dim, queries))
        return scan_panels<Type>(dim, values, queries, rows, stride, count, first_id, keeper,
                                 reinterpret_cast<float*>(scratch));
    constexpr decltype(&scan_streamed<Type, 1>) kScans[kStreamed] = {
        scan_streamed<Type, 1>, scan_streamed<Type, 2>, scan_streamed<Type, 3>, scan_streamed<Type, 4>,
        scan_streamed<Type, 5>, scan_streamed<Type, 6>, scan_streamed<Type, 7>, scan_streamed<Type, 8>};
    kScans[queries - 1](dim, values, rows, stride, count, first_id, keeper);
}

template <class Type>
constexpr FormKernels kFloats = {float_row_bytes<Type>, float_row_bytes<Type>, float_packed_size,
                                 float_scratch_size<Type>, pack_floats, scan_floats<Type>};

// One query at a time.
template <class Type>
void scan_one(int dim, const unsigned char* packed, int, const uint8_t* rows, int64_t stride, int64_t count,
              int64_t first_id, Keeper* keeper, unsigned char*) {
    scan_streamed<Type, 1>(dim, reinterpret_cast<const float*>(packed), rows, stride, count, first_id, keeper);
}

size_t no_scratch(int, int) { return 0; }

constexpr FormKernels kWhole8 = {float_row_bytes<Whole8>, float_row_bytes<Whole8>, float_packed_size, no_scratch,
                                 pack_floats, scan_one<Whole8>};

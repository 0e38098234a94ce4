// Relative similarity loss: over all pairs of pairs with teacher scores T_a > T_b, the sum of
// max(0, margin - (S_a - S_b)), and how often each pair is violated on the low side less on the high side, which
// is its gradient. Exact: everything after two sorts and one sweep of comparisons is integers.
//
//   t rank   place of a pair in the order of T, ties in row-major order
//   s rank   place in the order of S
//   violated(a, b) = margin - (S_a - S_b) > 0, in double; it can only fall as S_a grows and rise as S_b grows
//   r_b = how many x have violated(x, b), l_a = how many x have not violated(a, x): both are prefixes of the s order
//   Q(tau, t) = how many x have s rank < tau and t rank < t
//   C_b = violated with b on the low side  = r_b - Q(r_b, one past b's window)
//   H_a = violated with a on the high side = (first of a's window) - Q(l_a, first of a's window)
//
// A window holds what ties or lies within min_gap; with neither it is the pair alone. Q is counted in one scan over the
// s order, which inserts pairs and answers queries as they come up: counters tell how many were inserted in lower
// buckets of kBucket t ranks; the rest of each query goes to its bucket, a problem of its own that stays in the
// first-level cache, where a bit per t rank is enough.
#pragma once

#include <cstddef>
#include <cstdint>

namespace leafkern {

constexpr int64_t kMaxBatch = 46340;  // B * B < 2^31
constexpr int kDigitBits = 11;        // of a radix sort
constexpr int kBins = 1 << kDigitBits;
constexpr int kBucketBits = 11;
constexpr int kBucket = 1 << kBucketBits;
constexpr int64_t kMaxChunk = 65535;  // insertions counted in 16 bits

// Part of the scan: insertions of s ranks [begin, end) and the queries that come up among them, by s rank of the pair
// that asks: for C_b on the low side, for H_a on the high side.
struct Chunk {
    int64_t begin, end, low_begin, low_end, high_begin, high_end;
};

// Of one chunk and bucket: first counts; then what earlier chunks inserted, and where the chunk writes.
struct Share {
    uint32_t inserted, events, queries;
};

// Queries and insertions of all buckets, each bucket's together and in the order of the scan.
struct Streams {
    uint16_t* events;  // kind << 14 | place in the bucket; kind 0: insertion, 1: low query, 2: high query
    uint32_t* values;  // of each query: its count but for what its bucket adds
    uint32_t* asking;  // t rank of the pair that asks; null: the place in the bucket tells
};

struct Scan {
    const void* records;  // by S
    int64_t pairs, buckets;
    double margin;
    const uint32_t* window;  // t rank -> where its queries are asked; null: at the t rank itself
    Streams streams;
};

// What each instruction set offers for one type of score. Matrices are (batch, batch); pair p counts the upper
// triangle row by row. A record is a key that sorts as the score and an index.
struct RelativeSteps {
    size_t record;
    int digits;
    // Records of rows [begin, end) with index = rank[p], or the place in the matrix if rank is null; false if a score
    // is not finite.
    bool (*load)(const void* matrix, int64_t batch, int64_t begin, int64_t end, const uint32_t* rank, void* records);
    void (*histogram)(const void* records, int64_t begin, int64_t end, int digit, uint32_t* counts);
    void (*scatter)(const void* records, int64_t begin, int64_t end, int digit, uint32_t* offsets, void* sorted);
    // rank and order (t rank -> place in the matrix) from the records by T.
    void (*invert)(const void* records, int64_t batch, int64_t begin, int64_t end, uint32_t* rank, uint32_t* order);
    // window[t] = the first t rank beyond t with T more than `gap` higher; returns how many others lie inside.
    int64_t (*windows)(const void* records, int64_t pairs, int64_t begin, int64_t end, double gap, uint32_t* window);
    // The same from the matrix, or the first t rank whose T is not more than `gap` lower.
    void (*wide_windows)(const void* matrix, const uint32_t* order, int64_t pairs, int64_t begin, int64_t end,
                         double gap, bool lower, uint32_t* window);
    // First s rank whose low (high) query comes up only after `inserted` insertions.
    int64_t (*first_low)(const void* records, int64_t pairs, double margin, int64_t inserted);
    int64_t (*first_high)(const void* records, int64_t pairs, double margin, int64_t inserted);
    void (*count)(const Scan& scan, const Chunk& chunk, Share* shares);
    // Fills the chunk's part of the streams; returns its share of the sum of all C.
    int64_t (*scan)(const Scan& scan, const Chunk& chunk, const Share* shares, unsigned char* scratch);
    // Takes back what pairs inside a window were counted (all but exact ties if keep_ties); returns that share of C.
    int64_t (*correct)(const void* student, const void* teacher, const uint32_t* order, const uint32_t* window,
                       int64_t begin, int64_t end, double margin, bool keep_ties, uint32_t* counts);
    // Sum of (S - origin) * counts over row `row`; the row of the gradient, unless null, is counts * scale.
    double (*finish)(const void* student, int64_t batch, int64_t row, const uint32_t* rank, const uint32_t* counts,
                     double origin, double scale, void* gradient);
    void (*fill_nan)(int64_t batch, int64_t row, void* gradient);
    double (*score)(const void* records, int64_t index);
};

struct RelativeKernels {
    const char* isa;
    RelativeSteps steps[2];  // float, double
    size_t (*scratch_size)(int64_t buckets);
    // Answers one bucket's queries into counts, by place in the bucket; returns how much less C is for it.
    int64_t (*bucket)(const Streams& streams, int64_t events, int64_t event, int64_t query, uint32_t* counts);
    // The same for queries with windows, into counts by t rank, taken away if `negative`.
    int64_t (*wide_bucket)(const Streams& streams, int64_t events, int64_t event, int64_t query, bool negative,
                           uint32_t* counts);
};

namespace portable { extern const RelativeKernels relative_kernels; }
#if LEAFKERN_X86
namespace avx2 { extern const RelativeKernels relative_kernels; }
#endif

struct RelativeArguments {
    bool is_double;
    int64_t batch;  // >= 3, <= kMaxBatch
    int widths;
    double margin, min_gap;
    bool reference_ties;
    int threads;
    const void* student;  // (widths, batch, batch), only the upper triangles are read
    const void* teacher;  // (batch, batch)
    double* loss;         // (widths,)
    void* gradient;       // (widths, batch, batch) or null
};

size_t relative_workspace(const RelativeKernels& kernels, const RelativeArguments& arguments);
// Non-finite scores make the loss and the gradient of the width (of all, if the teacher's) NaN.
void relative(const RelativeKernels& kernels, const RelativeArguments& arguments, unsigned char* workspace);

}  // namespace leafkern

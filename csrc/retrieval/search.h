// Search for the k largest scores of queries, fused with the selection: scores are never stored.
// Integer scores I of folded queries:
//
//   form      base row                          score I of a query u
//   int8      D signed bytes c                  sum u*c
//   int4      two per byte, nibble = c + 8      sum u*c
//   bits      one bit b each, highest first     sum u*(2b - 1)
//   hamming   the same                          D - 2*hamming(u > 0, b)
//
// u is in [-63, 63]. Inside, codes of 8 and 4 bits are unsigned, v = c + 128 or c + 8, and S = sum u*v: pairs of
// products stay below 255*63*2 = 32,130 < 2^15, so 16-bit sums of two never saturate; more are added in 16 bits only as
// far as the packed query itself rules out overflow for every base. S must fit 32 bits: 255*63*D < 2^31, D <= kMaxDim.
// Bits: S is the sum over u*b less its least value, 0 to sum |u|; against signs the number of equal bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace leafkern {

// Of float32 queries with the forms float32 and float16, S is the float score itself, kept as an integer that orders as
// it does. What is no finite number is not kept but told. whole8 is float32 queries with signed bytes, for rescoring.
enum class Form { int8 = 0, int4 = 1, bits = 2, hamming = 3, float32 = 4, float16 = 5, whole8 = 6 };

constexpr int kForms = 7;

constexpr int kMaxDim = 131072;
constexpr int kMaxK = 8192;

// The best k of each query in one thread's share: keys (score, lower id first) as min-heaps.
struct Keeper {
    int64_t* keys;        // (queries, k)
    int32_t* counts;      // (queries,)
    int32_t* thresholds;  // (queries,): only higher scores enter; INT32_MIN until k are kept
    int k;
    const uint8_t* allowed;  // per row number, whether it may be kept; null: all may
    float bias = 0;          // added to each float score; not 0 for one query alone
    bool finite = true;      // false once a score was met that is not
};

// One form of base. Sizes never fall as queries grow: space for a block serves the last, shorter one too.
struct FormKernels {
    // Bytes of one row.
    int64_t (*stored_bytes)(int dim);
    // Bytes that scan() may read of one row.
    int64_t (*row_bytes)(int dim);
    // Bytes that the packed form of `queries` queries takes (a multiple of 64).
    size_t (*packed_size)(int dim, int queries);
    // Bytes of working space that one thread's scan needs (a multiple of 32).
    size_t (*scratch_size)(int dim, int queries);
    // given: (queries, dim) contiguous. flip: what base's bytes of bits were xor-ed with (0x80 where they are stored
    // minus 128), undone in the packed queries.
    void (*pack)(int dim, const void* given, int queries, uint8_t flip, unsigned char* packed);
    // Offers `count` rows, numbered from first_id up, to the keeper.
    void (*scan)(int dim, const unsigned char* packed, int queries, const uint8_t* rows, int64_t stride, int64_t count,
                 int64_t first_id, Keeper* keeper, unsigned char* scratch);
};

// What each instruction set offers, by Form.
struct SearchKernels {
    const char* isa;
    // w (rows, dim) contiguous and finite as u, int8 of the same shape, and a (rows,).
    void (*fold)(const float* w, int64_t rows, int64_t dim, int8_t* u, float* a);
    FormKernels forms[kForms];
};

namespace portable { extern const SearchKernels search_kernels; }
#if LEAFKERN_X86
namespace avx2 { extern const SearchKernels search_kernels; }
#endif

struct SearchArguments {
    Form form;
    int dim;
    uint8_t flip;
    const void* given;  // queries (queries, dim), contiguous: int8 u, or float for the float forms
    int64_t queries;
    const uint8_t* rows;  // (count, ...), each row contiguous, `stride` bytes apart
    int64_t count, stride;
    const uint8_t* allowed;  // (count,), not 0: rows that may be found; null: all
    int k;                   // <= min(count, kMaxK)
    int threads;
    int32_t* scores;  // (queries, k), bits of floats for the float forms; INT32_MIN, -inf where fewer rows are allowed
    int64_t* ids;     // (queries, k); -1 there
};

size_t search_workspace(const SearchKernels& kernels, const SearchArguments& arguments);
// False where a float score is not finite; what was found means nothing then.
bool search(const SearchKernels& kernels, const SearchArguments& arguments, unsigned char* workspace);

// The best of each query's candidates by the float scores of their rows.
struct RescoreArguments {
    Form form;  // float32, float16 or whole8
    int dim;
    const float* given;  // (queries, dim), contiguous
    const float* bias;   // (queries,), added to each score; null: nothing
    int64_t queries;
    const uint8_t* rows;  // each row contiguous, `stride` bytes apart
    int64_t stride;
    const int64_t* candidates;  // (queries, count) numbers of rows; -1: none
    int64_t count;
    int k;  // <= count
    int threads;
    int32_t* scores;  // (queries, k), bits of floats; -inf where there are fewer candidates
    int64_t* ids;     // (queries, k); -1 there
};

size_t rescore_workspace(const SearchKernels& kernels, const RescoreArguments& arguments);
// False where a score is not finite.
bool rescore(const SearchKernels& kernels, const RescoreArguments& arguments, unsigned char* workspace);

}  // namespace leafkern

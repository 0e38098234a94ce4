// The search kernels, compiled once per instruction set into namespace LEAFKERN_ISA. No templates or inline functions
// of the standard library here: the linker might keep this object's copy for every caller.
#include <climits>
#include <cstring>

#include "retrieval/search.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace leafkern {
namespace LEAFKERN_ISA {
namespace {

template <typename T>
T least(T a, T b) {
    return a < b ? a : b;
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

#include "common/topk.inl"
#include "retrieval/bits.inl"
#include "retrieval/floats.inl"
#include "retrieval/fold.inl"
#include "retrieval/integers.inl"
#include "retrieval/signs.inl"

#define LEAFKERN_TEXT_(x) #x
#define LEAFKERN_TEXT(x) LEAFKERN_TEXT_(x)

}  // namespace

extern const SearchKernels search_kernels;
const SearchKernels search_kernels = {
    LEAFKERN_TEXT(LEAFKERN_ISA),
    fold,
    {kValues<Int8>, kValues<Int4>, kBits, kSigns, kFloats<Float32>, kFloats<Float16>, kWhole8}};

}  // namespace LEAFKERN_ISA
}  // namespace leafkern

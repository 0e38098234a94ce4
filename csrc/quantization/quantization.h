// Vectors as codes, one pass over them: the finite check, the codes and their packing together. 4*N*D bytes of float32
// read and the codes written: bound by bandwidth.
//
//   form   code of x                                              layout
//   int8   clip(floor((x - low)/step), 0, 255) - 128              a signed byte each
//   int4   clip(round half to even((x - low)/step), 0, 15)        two per byte, even dimension in the low nibble
//   bits   x > 0                                                  eight per byte, first dimension highest, ^ flip
//   half   x in binary16, rounded half to even                    two bytes each
//
// Everything in float32, as the reference computes it; float16 and bfloat16 are converted first, which is exact.
#pragma once

#include <cstdint>

namespace leafkern {

enum class FloatType { float32 = 0, float16 = 1, bfloat16 = 2 };
enum class CodeForm { int8 = 0, int4 = 1, bits = 2, half = 3 };

struct Vectors {
    FloatType type;
    const void* values;
    int64_t rows, dim, row_stride, stride;  // strides in entries; stride: from a dimension to the next
};

struct Codes {
    CodeForm form;
    uint8_t flip;
    const float *low, *step;  // (dim,), for int8 and int4; no step is 0
    uint8_t* bytes;           // contiguous rows; what a row's last byte does not need is 0 (before flip)
};

struct QuantizationKernels {
    // Rows [begin, end). False where an entry is NaN or infinity, or becomes infinity.
    bool (*encode)(const Vectors& x, const Codes& codes, int64_t begin, int64_t end);
    // Widens low and high (dim,) by rows [begin, end). False where an entry is NaN or infinity.
    bool (*extremes)(const Vectors& x, int64_t begin, int64_t end, float* low, float* high);
};

namespace portable { extern const QuantizationKernels quantization_kernels; }
#if LEAFKERN_X86
namespace avx2 { extern const QuantizationKernels quantization_kernels; }
#endif

bool encode(const QuantizationKernels& kernels, const Vectors& x, const Codes& codes, int threads);

// Smallest and largest value of each dimension into found (2, dim). spare: (threads, 2, dim).
bool extremes(const QuantizationKernels& kernels, const Vectors& x, int threads, float* found, float* spare);

}  // namespace leafkern

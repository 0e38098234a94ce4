// The quantisation kernels, compiled once per instruction set into namespace LEAFKERN_ISA. Loops are written for the
// compiler to turn into vectors.
#include <cstring>

#include "quantization/quantization.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace leafkern {
namespace LEAFKERN_ISA {
namespace {

constexpr int kPiece = 1024;  // entries of a row at a time; a multiple of 8, so that no byte of codes belongs to two
constexpr uint32_t kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000;

#include "common/half.inl"

// ---- Codes of a piece of a row. Each returns the bits of its largest magnitude, or of infinity where there is NaN.

uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
uint32_t magnitude(float x) { return bits_of(x) & kMagnitude; }

// The bin of x, rounded down or to nearest, within [0, kLast].
template <int kLast, bool kNearest>
uint8_t level(float x, float low, float step) {
    float bin = (x - low) / step;
    bin = bin > 0.f ? bin : 0.f;
    bin = bin < kLast ? bin : kLast;
    // Added to 1.5 * 2^23, a small number is rounded to an integer, half to even, which ends in the lowest bits.
    return kNearest ? bits_of(bin + 12582912.f) & kLast : static_cast<uint8_t>(bin);
}

#if defined(__AVX2__)
// The levels of 32 entries; `finite` becomes NaN after NaN or infinity.
template <int kLast, bool kNearest>
inline __m256i levels(const float* x, const float* low, const float* step, __m256& finite) {
    const auto eight = [&](int at) {
        const __m256 values = _mm256_loadu_ps(x + at);
        finite = _mm256_fmadd_ps(values, _mm256_setzero_ps(), finite);
        const __m256 bins = _mm256_div_ps(_mm256_sub_ps(values, _mm256_loadu_ps(low + at)), _mm256_loadu_ps(step + at));
        const __m256 limited = _mm256_min_ps(bins, _mm256_set1_ps(kLast));
        return kNearest ? _mm256_cvtps_epi32(limited) : _mm256_cvttps_epi32(limited);
    };
    // Packing saturates what is below 0, and leaves fours in the order 0 2 4 6 1 3 5 7.
    const __m256i first = _mm256_packs_epi32(eight(0), eight(8)), second = _mm256_packs_epi32(eight(16), eight(24));
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

uint32_t largest_of(__m256 finite) {
    return _mm256_movemask_ps(_mm256_cmp_ps(finite, finite, _CMP_UNORD_Q)) ? kInfinity : 0;
}
#endif

uint32_t encode_int8(const float* x, int count, const float* low, const float* step, uint8_t* codes) {
    uint32_t largest = 0;
    int i = 0;
#if defined(__AVX2__)
    __m256 finite = _mm256_setzero_ps();
    for (; i + 32 <= count; i += 32) {
        const __m256i bytes = levels<255, false>(x + i, low + i, step + i, finite);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)));
    }
    largest = largest_of(finite);
#endif
    for (; i < count; ++i) {
        largest = larger(largest, magnitude(x[i]));
        codes[i] = level<255, false>(x[i], low[i], step[i]) ^ 0x80;
    }
    return largest;
}

uint32_t encode_int4(const float* x, int count, const float* low, const float* step, uint8_t* codes) {
    uint32_t largest = 0;
    int i = 0;
#if defined(__AVX2__)
    __m256 finite = _mm256_setzero_ps();
    for (; i + 32 <= count; i += 32) {
        const __m256i bytes = levels<15, true>(x + i, low + i, step + i, finite);
        const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i / 2), _mm256_castsi256_si128(packed));
    }
    largest = largest_of(finite);
#endif
    for (; i < count; i += 2) {
        largest = larger(largest, magnitude(x[i]));
        codes[i / 2] = level<15, true>(x[i], low[i], step[i]);
        if (i + 1 == count) break;
        largest = larger(largest, magnitude(x[i + 1]));
        codes[i / 2] |= static_cast<uint8_t>(level<15, true>(x[i + 1], low[i + 1], step[i + 1]) << 4);
    }
    return largest;
}

uint32_t encode_bits(const float* x, int count, uint8_t flip, uint8_t* codes) {
    uint32_t largest = 0;
    int i = 0;
#if defined(__AVX2__)
    __m256 finite = _mm256_setzero_ps();
    // As in `levels`; then each eight is turned round.
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i turned = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x08090A0B0C0D0E0F, 0x0001020304050607));
    const int32_t flips = static_cast<int32_t>(flip * 0x01010101u);
    const auto positive = [&](const float* at) {
        const __m256 values = _mm256_loadu_ps(at), zero = _mm256_setzero_ps();
        finite = _mm256_fmadd_ps(values, zero, finite);
        return _mm256_castps_si256(_mm256_cmp_ps(values, zero, _CMP_GT_OQ));
    };
    for (; i + 32 <= count; i += 32) {
        const __m256i first = _mm256_packs_epi32(positive(x + i), positive(x + i + 8));
        const __m256i second = _mm256_packs_epi32(positive(x + i + 16), positive(x + i + 24));
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), in_order);
        const int32_t word = _mm256_movemask_epi8(_mm256_shuffle_epi8(bytes, turned)) ^ flips;
        std::memcpy(codes + i / 8, &word, 4);
    }
    largest = largest_of(finite);
#endif
    for (; i < count; i += 8) {
        int byte = 0;
        for (int j = i; j < i + 8 && j < count; ++j) {
            largest = larger(largest, magnitude(x[j]));
            byte |= (x[j] > 0) << (7 - (j - i));
        }
        codes[i / 8] = static_cast<uint8_t>(byte ^ flip);
    }
    return largest;
}

uint16_t half_of(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & kMagnitude, sign = bits >> 16 & 0x8000;
    if (magnitude >= bits_of(65536.f)) return static_cast<uint16_t>(sign | 0x7C00);
    // Below 2^-14 numbers are multiples of 2^-24, as floats from 0.5 on are.
    if (magnitude < bits_of(0x1p-14f))
        return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

uint32_t encode_half(const float* x, int count, uint8_t* codes) {
    uint32_t largest = 0;
    int i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 2 * i), halves);
    }
    for (int j = 0; j < i; ++j) largest = larger(largest, magnitude(x[j]));
#endif
    for (; i < count; ++i) {
        const uint16_t half = half_of(x[i]);
        std::memcpy(codes + 2 * i, &half, 2);
        largest = larger(largest, magnitude(x[i]));
    }
    return largest;
}

// Widens [low, high] by a piece of a row.
uint32_t widen(const float* x, int count, float* __restrict low, float* __restrict high) {
    uint32_t largest = 0;
    for (int i = 0; i < count; ++i) {
        largest = larger(largest, magnitude(x[i]));
        low[i] = x[i] < low[i] ? x[i] : low[i];
        high[i] = x[i] > high[i] ? x[i] : high[i];
    }
    return largest;
}

// ---- Rows.

int64_t bytes_of(CodeForm form, int64_t dims) {
    switch (form) {
        case CodeForm::int8: return dims;
        case CodeForm::int4: return (dims + 1) / 2;
        case CodeForm::bits: return (dims + 7) / 8;
        default: return 2 * dims;
    }
}

// Calls body(piece, count, first dimension) for the pieces of a row, as floats.
template <class Type, typename Body>
void each_piece(const Vectors& x, int64_t row, const Body& body) {
    float space[kPiece];
    const auto* stored = static_cast<const typename Type::Stored*>(x.values) + row * x.row_stride;
    for (int64_t d = 0; d < x.dim; d += kPiece) {
        const int count = static_cast<int>(x.dim - d < kPiece ? x.dim - d : kPiece);
        body(floats_of<Type>(stored + d * x.stride, x.stride, count, space), count, d);
    }
}

uint32_t encode_piece(const Codes& c, const float* x, int count, int64_t d, uint8_t* codes) {
    switch (c.form) {
        case CodeForm::int8: return encode_int8(x, count, c.low + d, c.step + d, codes);
        case CodeForm::int4: return encode_int4(x, count, c.low + d, c.step + d, codes);
        case CodeForm::bits: return encode_bits(x, count, c.flip, codes);
        default: return encode_half(x, count, codes);
    }
}

template <class Type>
bool encode_rows(const Vectors& x, const Codes& c, int64_t begin, int64_t end) {
    uint32_t largest = 0;
    const int64_t width = bytes_of(c.form, x.dim);
    for (int64_t row = begin; row < end; ++row)
        each_piece<Type>(x, row, [&](const float* piece, int count, int64_t d) {
            uint8_t* codes = c.bytes + row * width + bytes_of(c.form, d);
            largest = larger(largest, encode_piece(c, piece, count, d, codes));
        });
    // From 65520 on, numbers round to infinity in binary16.
    return largest < (c.form == CodeForm::half ? bits_of(65520.f) : kInfinity);
}

template <class Type>
bool extremes_of_rows(const Vectors& x, int64_t begin, int64_t end, float* low, float* high) {
    uint32_t largest = 0;
    for (int64_t row = begin; row < end; ++row)
        each_piece<Type>(x, row, [&](const float* piece, int count, int64_t d) {
            largest = larger(largest, widen(piece, count, low + d, high + d));
        });
    return largest < kInfinity;
}

bool encode(const Vectors& x, const Codes& codes, int64_t begin, int64_t end) {
    const auto run = x.type == FloatType::float32   ? encode_rows<Float32>
                     : x.type == FloatType::float16 ? encode_rows<Float16>
                                                    : encode_rows<BFloat16>;
    return run(x, codes, begin, end);
}

bool extremes(const Vectors& x, int64_t begin, int64_t end, float* low, float* high) {
    const auto run = x.type == FloatType::float32   ? extremes_of_rows<Float32>
                     : x.type == FloatType::float16 ? extremes_of_rows<Float16>
                                                    : extremes_of_rows<BFloat16>;
    return run(x, begin, end, low, high);
}

}  // namespace

extern const QuantizationKernels quantization_kernels;
const QuantizationKernels quantization_kernels = {encode, extremes};

}  // namespace LEAFKERN_ISA
}  // namespace leafkern

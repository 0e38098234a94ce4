// float16 and bfloat16 as floats, exactly; compiled into each instruction set's own namespace.

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

struct Float32 {
    using Stored = float;
    static constexpr bool kHalf = false;
    static float value(float x) { return x; }
};

struct Float16 {
    using Stored = uint16_t;
    static constexpr bool kHalf = true;
    static float value(uint16_t x) {
        const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7FFF;
        // Subnormal: a multiple of 2^-24. Infinity and NaN have the largest exponent in both types.
        if (magnitude < 0x400) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
        return float_of(sign | ((magnitude << 13) + ((magnitude < 0x7C00 ? 112u : 224u) << 23)));
    }
};

struct BFloat16 {
    using Stored = uint16_t;
    static constexpr bool kHalf = false;
    static float value(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
};

// `count` entries, `stride` apart, as floats side by side: where they are, or converted into `space`.
template <class Type>
const float* floats_of(const typename Type::Stored* x, int64_t stride, int64_t count, float* space) {
    int64_t i = 0;
    if (stride == 1) {
        if constexpr (sizeof(*x) == sizeof(float)) return x;
#if defined(__AVX2__)
        if constexpr (Type::kHalf)
            for (; i + 8 <= count; i += 8)
                _mm256_storeu_ps(space + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
        for (; i < count; ++i) space[i] = Type::value(x[i]);
    }
    for (; i < count; ++i) space[i] = Type::value(x[i * stride]);
    return space;
}

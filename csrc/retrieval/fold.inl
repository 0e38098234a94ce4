// Queries as 7-bit integers: a = max|w|/63, u = w/a rounded half to even; a = 0 gives u = 0. For finite w.

void fold(const float* w, int64_t rows, int64_t dim, int8_t* u, float* a) {
    for (int64_t row = 0; row < rows; ++row, w += dim, u += dim) {
        // Magnitudes of floats order as their bits do, which the compiler takes in vectors.
        uint32_t largest = 0;
        for (int64_t i = 0; i < dim; ++i) {
            const uint32_t magnitude = bits_of(w[i]) & INT32_MAX;
            largest = magnitude > largest ? magnitude : largest;
        }
        const float step = float_of(largest) / 63.f;
        a[row] = step;
        if (step == 0.f) {
            std::memset(u, 0, dim);
            continue;
        }
        for (int64_t i = 0; i < dim; ++i) {
            // |w/step| is 63 at most but for the rounding of step where it is denormal.
            float level = w[i] / step;
            level = level < 63.f ? level : 63.f;
            level = level > -63.f ? level : -63.f;
            // Added to 1.5 * 2^23, a small number is rounded to an integer, half to even, which ends in the lowest bits.
            u[i] = static_cast<int8_t>(bits_of(level + 12582912.f));
        }
    }
}

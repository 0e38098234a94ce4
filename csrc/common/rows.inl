// Sums over rows and what follows from their norms, compiled into each instruction set's own namespace.

constexpr double kLeastNorm = 1e-12;

template <typename T>
constexpr int kLanes = 64 / sizeof(T);  // independent sums, which the compiler turns into vectors

template <typename T>
const T* row_of(const void* matrix, int64_t row, int64_t stride) {
    return static_cast<const T*>(matrix) + row * stride;
}
template <typename T>
T* row_of(void* matrix, int64_t row, int64_t stride) {
    return static_cast<T*>(matrix) + row * stride;
}

template <typename T, int count>
double sum(const T (&lanes)[count]) {
    double total = 0;
    for (const T lane : lanes) total += lane;
    return total;
}

template <typename T>
double dot(const T* x, const T* y, int64_t count) {
    T lanes[kLanes<T>] = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>)
        for (int l = 0; l < kLanes<T>; ++l) lanes[l] += x[i + l] * y[i + l];
    for (; i < count; ++i) lanes[0] += x[i] * y[i];
    return sum(lanes);
}

// In double, whatever the type: squares of a float neither overflow nor vanish there.
template <typename T>
double sum_of_squares(const T* x, int64_t count) {
    double lanes[16] = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int l = 0; l < 16; ++l) lanes[l] += static_cast<double>(x[i + l]) * x[i + l];
    for (; i < count; ++i) lanes[0] += static_cast<double>(x[i]) * x[i];
    return sum(lanes);
}

// y += scale * x, over columns that may be none.
template <typename T>
void add(T scale, const T* x, int64_t count, T* y) {
    for (int64_t i = 0; i < count; ++i) y[i] += scale * x[i];
}

template <typename T>
T inverse_norm(double squares) {
    const double norm = sqrt(squares);
    return static_cast<T>(norm < kLeastNorm ? (norm == 0 ? 0 : 1 / kLeastNorm) : 1 / norm);
}

// What the row's product with a gradient is multiplied by for the part along the row that its norm takes out: the square
// of the inverse norm, 0 below 1e-12, where n(x) is linear. NaN stays.
template <typename T>
double projected(T inverse) {
    return inverse >= static_cast<T>(1 / kLeastNorm) ? 0 : static_cast<double>(inverse) * inverse;
}

// The width after number `width` of descending `dims`, 0 after the last: its prefix begins the rest of the wider one.
int64_t narrower(const int64_t* dims, int64_t widths, int64_t width) {
    return width + 1 < widths ? dims[width + 1] : 0;
}

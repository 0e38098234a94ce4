// The steps of the contrastive losses, compiled once per instruction set into namespace LEAFKERN_ISA. Loops run over
// tiles of a row that stay in the first-level cache and alias nothing, so that the compiler can vectorise them. No
// templates or inline functions of the standard library here: the linker might keep this object's copy for every
// caller.
#include <math.h>

#include <cstring>

#include "contrastive/contrastive.h"

namespace leafkern {
namespace LEAFKERN_ISA {
namespace {

#include "common/rows.inl"

constexpr int64_t kTile = 512;

// ---- exp(x) for x <= 1: 2^n times a polynomial of x - n log 2, which is at most log(2) / 2. Within 2 ulp; 0 where a
// normal number can't hold it; NaN stays.

template <typename T>
struct Exp;
template <>
struct Exp<float> {
    using Bits = uint32_t;
    static constexpr int kMantissa = 23;
    static constexpr Bits kBias = 127;
    static constexpr float kLowest = -87.0f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
    static constexpr float kHigh = 0.693145751953125f, kLow = 1.42860682030941723e-6f;
    static float polynomial(float r) {
        float p = 1.0f / 5040;
        p = p * r + 1.0f / 720;
        p = p * r + 1.0f / 120;
        p = p * r + 1.0f / 24;
        p = p * r + 1.0f / 6;
        p = p * r + 0.5f;
        p = p * r + 1.0f;
        return p * r + 1.0f;
    }
};
template <>
struct Exp<double> {
    using Bits = uint64_t;
    static constexpr int kMantissa = 52;
    static constexpr Bits kBias = 1023;
    static constexpr double kLowest = -708.0, kRound = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double kHigh = 0.693147180369123816490, kLow = 1.90821492927058770002e-10;
    static double polynomial(double r) {
        double p = 1.0 / 6227020800;
        p = p * r + 1.0 / 479001600;
        p = p * r + 1.0 / 39916800;
        p = p * r + 1.0 / 3628800;
        p = p * r + 1.0 / 362880;
        p = p * r + 1.0 / 40320;
        p = p * r + 1.0 / 5040;
        p = p * r + 1.0 / 720;
        p = p * r + 1.0 / 120;
        p = p * r + 1.0 / 24;
        p = p * r + 1.0 / 6;
        p = p * r + 0.5;
        p = p * r + 1.0;
        return p * r + 1.0;
    }
};

template <typename T>
T exponential(T x) {
    using E = Exp<T>;
    const T inside = x < E::kLowest ? E::kLowest : x;
    const T rounded = inside * static_cast<T>(1.44269504088896340736) + E::kRound;
    const T n = rounded - E::kRound;
    typename E::Bits bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits = (bits + E::kBias) << E::kMantissa;
    T power;
    std::memcpy(&power, &bits, sizeof power);
    const T value = E::polynomial((inside - n * E::kHigh) - n * E::kLow) * power;
    return x < E::kLowest ? 0 : value;
}

// ---- Tiles

template <typename T>
struct alignas(64) Tile {
    T at[kTile];

    // Fills up to whole vectors; returns the new count.
    int64_t pad(int64_t count, T filling) {
        for (; count % kLanes<T> != 0; ++count) at[count] = filling;
        return count;
    }
};

template <typename T>
void load_cosines(Tile<T>& tile, const T* raw, const T* inverse, T inverse_row, int64_t count) {
    for (int64_t j = 0; j < count; ++j) tile.at[j] = raw[j] * inverse_row * inverse[j];
}

// Entry by entry of the tiles taken, which the compiler vectorises where it does not a running maximum.
template <typename T>
struct Maximum {
    Tile<T> most;
    Maximum() {
        for (T& each : most.at) each = -static_cast<T>(INFINITY);
    }
    // NaN is no maximum: it shows in the sum of exponentials.
    void take(const Tile<T>& tile, int64_t count) {
        for (int64_t j = 0; j < count; ++j) most.at[j] = tile.at[j] > most.at[j] ? tile.at[j] : most.at[j];
    }
    T value() {
        for (int64_t half = kTile / 2; half > 0; half /= 2)
            for (int64_t j = 0; j < half; ++j)
                most.at[j] = most.at[j + half] > most.at[j] ? most.at[j + half] : most.at[j];
        return most.at[0];
    }
};

template <typename T>
double sum_of(const Tile<T>& tile, int64_t padded) {
    T lanes[kLanes<T>] = {};
    for (int64_t j = 0; j < padded; j += kLanes<T>)
        for (int l = 0; l < kLanes<T>; ++l) lanes[l] += tile.at[j + l];
    return sum(lanes);
}

// tile = exp((tile - top) * scale); returns the sum.
template <typename T>
double exponentials(Tile<T>& tile, T top, T scale, int64_t count) {
    const int64_t padded = tile.pad(count, -static_cast<T>(INFINITY));
    for (int64_t j = 0; j < padded; ++j) tile.at[j] = exponential((tile.at[j] - top) * scale);
    return sum_of(tile, padded);
}

template <typename Body>
void tiles(int64_t count, const Body& body) {
    for (int64_t at = 0; at < count; at += kTile) body(at, count - at < kTile ? count - at : kTile);
}

template <typename T>
struct RowPart {
    const T *raw, *inverse;
    T *weights, *partial;
    int64_t count;

    RowPart(const ContrastivePart& part, int64_t row)
        : raw(row_of<T>(part.raw, row, part.stride)),
          inverse(row_of<T>(part.inverse, row, part.inverse_stride)),
          weights(row_of<T>(part.weights, row, part.stride)),
          partial(part.partial ? row_of<T>(part.partial, row / kGroup, part.count) : nullptr),
          count(part.count) {}

    // Adds the tile's weight * raw to the sums of its columns; returns the tile's own.
    double add(const Tile<T>& weight, int64_t at, int64_t n) const {
        Tile<T> product;
        for (int64_t j = 0; j < n; ++j) product.at[j] = weight.at[j] * raw[at + j];
        if (partial)
            for (int64_t j = 0; j < n; ++j) partial[at + j] += product.at[j];
        return sum_of(product, product.pad(n, 0));
    }
};

// ---- InfoNCE

double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
double sigmoid(double x) { return 1 / (1 + exp(-x)); }

struct Focal {
    double value, slope;  // of -(1 - p)^gamma log p, and its derivative by the gap
};

// gap: log mass of the other columns less the positive's, so that 1 - p = sigmoid(gap), -log p = softplus(gap) and
// log(1 - p) = -softplus(-gap): exact for p -> 0 and p -> 1, where p itself would lose everything.
Focal focal(double gap, double gamma, bool detached) {
    const double surprise = softplus(gap);
    if (gamma == 0) return {surprise, sigmoid(gap)};
    const double weight = exp(-gamma * softplus(-gap));
    const double slope = sigmoid(gap) + (detached ? 0 : gamma * sigmoid(-gap) * surprise);
    return {weight * surprise, weight * slope};
}

template <typename T>
void info_nce_row(const ContrastiveRows& a, int64_t row) {
    const RowPart<T> parts[3] = {{a.parts[0], row}, {a.parts[1], row}, {a.parts[2], row}};
    const T inverse_row = static_cast<const T*>(a.inverse)[row], infinity = static_cast<T>(INFINITY);
    const int64_t own = a.own + row;
    const T raw_own = parts[0].raw[own], inverse_own = parts[0].inverse[own];
    const T positive = raw_own * inverse_row * inverse_own, limit = positive - static_cast<T>(a.margin);

    Tile<T> tile;
    Maximum<T> maximum;
    for (int p = 0; p < 3; ++p) {
        const RowPart<T>& part = parts[p];
        const int64_t* ids = a.parts[p].ids;
        tiles(part.count, [&](int64_t at, int64_t n) {
            load_cosines(tile, part.raw + at, part.inverse + at, inverse_row, n);
            if (ids)
                for (int64_t j = 0; j < n; ++j) tile.at[j] = ids[at + j] == a.ids[row] ? -infinity : tile.at[j];
            if (a.has_margin && a.parts[p].maskable)
                for (int64_t j = 0; j < n; ++j) tile.at[j] = tile.at[j] > limit ? -infinity : tile.at[j];
            if (p == 0 && own >= at && own < at + n) tile.at[own - at] = -infinity;
            std::memcpy(part.weights + at, tile.at, n * sizeof(T));
            maximum.take(tile, n);
        });
    }
    T top = maximum.value();
    if (top == -infinity) top = 0;  // without other columns: all exponentials are 0

    double mass = 0;
    const T scale = static_cast<T>(1 / a.temperature);
    for (const RowPart<T>& part : parts)
        tiles(part.count, [&](int64_t at, int64_t n) {
            std::memcpy(tile.at, part.weights + at, n * sizeof(T));
            mass += exponentials(tile, top, scale, n);
            std::memcpy(part.weights + at, tile.at, n * sizeof(T));
        });
    // Cosines are subtracted before the temperature magnifies them: no digits are lost to large logits.
    const double gap = (static_cast<double>(top) - static_cast<double>(positive)) / a.temperature + log(mass);
    const Focal result = focal(gap, a.gamma, a.detach_focal);
    a.losses[row] = result.value;
    if (!a.gradient) return;

    // The mass is at least 1, or 0 without other columns.
    const double slope = result.slope * a.share / a.temperature * inverse_row;
    const T factor = static_cast<T>(slope / (mass > 1 ? mass : 1)), own_weight = static_cast<T>(-slope * inverse_own);
    double sum = 0;
    for (const RowPart<T>& part : parts)
        tiles(part.count, [&](int64_t at, int64_t n) {
            for (int64_t j = 0; j < n; ++j) tile.at[j] = part.weights[at + j] * factor * part.inverse[at + j];
            if (&part == parts && own >= at && own < at + n) tile.at[own - at] = own_weight;
            std::memcpy(part.weights + at, tile.at, n * sizeof(T));
            if (a.sums) sum += part.add(tile, at, n);
        });
    if (a.sums) a.sums[row] = sum;
}

// ---- Soft labels

template <typename T>
void soft_label_row(const ContrastiveRows& a, int64_t row) {
    const RowPart<T> parts[3] = {{a.parts[0], row}, {a.parts[1], row}, {a.parts[2], row}};
    const int64_t columns = parts[0].count + parts[1].count + parts[2].count;
    const T* scores = row_of<T>(a.teacher, row, columns);
    const T inverse_row = static_cast<const T*>(a.inverse)[row];
    const T scale = static_cast<T>(1 / a.temperature), teacher_scale = static_cast<T>(1 / a.teacher_temperature);

    Tile<T> tile, teacher;
    Maximum<T> maximum, teacher_maximum;
    tiles(columns, [&](int64_t at, int64_t n) {
        std::memcpy(teacher.at, scores + at, n * sizeof(T));
        teacher_maximum.take(teacher, n);
    });
    for (const RowPart<T>& part : parts)
        tiles(part.count, [&](int64_t at, int64_t n) {
            load_cosines(tile, part.raw + at, part.inverse + at, inverse_row, n);
            maximum.take(tile, n);
        });
    const T top = maximum.value(), teacher_top = teacher_maximum.value();

    double mass = 0, teacher_mass = 0;
    tiles(columns, [&](int64_t at, int64_t n) {
        std::memcpy(teacher.at, scores + at, n * sizeof(T));
        teacher_mass += exponentials(teacher, teacher_top, teacher_scale, n);
    });
    for (const RowPart<T>& part : parts)
        tiles(part.count, [&](int64_t at, int64_t n) {
            load_cosines(tile, part.raw + at, part.inverse + at, inverse_row, n);
            mass += exponentials(tile, top, scale, n);
        });
    const T log_mass = static_cast<T>(log(mass)), teacher_log_mass = static_cast<T>(log(teacher_mass));

    const T factor = static_cast<T>(a.share / a.temperature * inverse_row);
    double loss = 0, sum = 0;
    Tile<T> terms;
    for (const RowPart<T>& part : parts) {
        tiles(part.count, [&](int64_t at, int64_t n) {
            load_cosines(tile, part.raw + at, part.inverse + at, inverse_row, n);
            for (int64_t j = 0; j < n; ++j) {
                tile.at[j] = (tile.at[j] - top) * scale - log_mass;
                teacher.at[j] = (scores[at + j] - teacher_top) * teacher_scale - teacher_log_mass;
            }
            for (int64_t j = 0; j < n; ++j) {
                const T probability = exponential(teacher.at[j]), difference = teacher.at[j] - tile.at[j];
                // 0 log 0 = 0.
                terms.at[j] = probability == 0 ? 0 : probability * difference;
                tile.at[j] = exponential(tile.at[j]) - probability;
            }
            for (int64_t j = 0; j < n; ++j) tile.at[j] *= factor * part.inverse[at + j];
            loss += sum_of(terms, terms.pad(n, 0));
            if (!a.gradient) return;
            if (a.sums) sum += part.add(tile, at, n);
            std::memcpy(part.weights + at, tile.at, n * sizeof(T));
        });
        scores += part.count;
    }
    a.losses[row] = loss;
    if (a.sums) a.sums[row] = sum;
}

// ---- Blocks of rows

template <typename T>
void rows(const ContrastiveRows& a, int64_t begin, int64_t end) {
    for (const ContrastivePart& part : a.parts)
        if (part.partial) std::memset(row_of<T>(part.partial, begin / kGroup, part.count), 0, part.count * sizeof(T));
    for (int64_t row = begin; row < end; ++row) {
        if (a.teacher)
            soft_label_row<T>(a, row);
        else
            info_nce_row<T>(a, row);
        if (!a.gradient) continue;
        for (int p = 0; p < 2; ++p)
            for (int64_t width = 1; width < a.widths; ++width) {
                T* weights = row_of<T>(a.parts[p].weights, row, a.parts[p].stride) + width * a.width_stride;
                const T* wider = weights - a.width_stride;
                for (int64_t j = 0; j < a.parts[p].count; ++j) weights[j] += wider[j];
            }
    }
}

template <typename T>
void column_sums(const ContrastivePart& part, int64_t groups, int64_t begin, int64_t end) {
    for (int64_t group = 0; group < groups; ++group) {
        const T* partial = row_of<T>(part.partial, group, part.count);
        for (int64_t j = begin; j < end; ++j) part.sums[j] += partial[j];
    }
}

// ---- What the norms project out

template <typename T>
void project(const Rows& m, const ContrastiveProjection& projection, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(m.x, row, m.stride);
        T* gradient = row_of<T>(projection.gradient, row, projection.stride);
        double remaining = dot(x, gradient, m.dims[0]);
        for (int64_t width = 1; width < m.widths; ++width)
            remaining -= projection.sums[(width - 1) * projection.sums_stride + row];
        T total = 0;
        for (int64_t width = 0; width < m.widths; ++width) {
            const double sum = width == 0 ? remaining : projection.sums[(width - 1) * projection.sums_stride + row];
            total += static_cast<T>(sum * projected(row_of<T>(m.inverse, width, m.inverse_stride)[row]));
            const int64_t first = narrower(m.dims, m.widths, width);
            add(-total, x + first, m.dims[width] - first, gradient + first);
        }
    }
}

// ---- Columns that each row has to itself

template <typename T>
void own_products(const Rows& m, const ContrastiveOwn& own, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(m.x, row, m.stride);
        for (int64_t c = 0; c < own.count; ++c) {
            const T* y = row_of<T>(own.y, row, own.row_stride) + c * own.stride;
            double squares = 0;
            double raw = 0;
            for (int64_t width = m.widths - 1; width >= 0; --width) {
                const int64_t first = narrower(m.dims, m.widths, width), count = m.dims[width] - first;
                const int64_t place = (width * m.rows + row) * own.count + c;
                squares += sum_of_squares(y + first, count);
                raw += dot(x + first, y + first, count);
                static_cast<T*>(own.raw)[place] = static_cast<T>(raw);
                static_cast<T*>(own.inverse)[place] = inverse_norm<T>(squares);
            }
        }
    }
}

template <typename T>
void own_gradients(const Rows& m, const ContrastiveOwn& own, int64_t begin, int64_t end) {
    const T* weights = static_cast<const T*>(own.weights);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(m.x, row, m.stride);
        for (int64_t c = 0; c < own.count; ++c) {
            const T* y = row_of<T>(own.y, row, own.row_stride) + c * own.stride;
            T weight = 0, total = 0;
            for (int64_t width = 0; width < m.widths; ++width) {
                const int64_t place = (width * m.rows + row) * own.count + c;
                const T raw = static_cast<const T*>(own.raw)[place];
                weight += weights[place];
                const double sum = static_cast<double>(weights[place]) * raw;
                total += static_cast<T>(sum * projected(static_cast<const T*>(own.inverse)[place]));
                const int64_t first = narrower(m.dims, m.widths, width);
                if (own.row_gradient) {
                    T* gradient = row_of<T>(own.row_gradient, row, own.row_gradient_stride);
                    add(weight, y + first, m.dims[width] - first, gradient + first);
                }
                if (own.gradient) {
                    T* gradient = row_of<T>(own.gradient, row * own.count + c, own.gradient_stride);
                    for (int64_t d = first; d < m.dims[width]; ++d) gradient[d] = weight * x[d] - total * y[d];
                }
            }
        }
    }
}

template <typename T>
constexpr ContrastiveSteps steps_of() {
    return {rows<T>, column_sums<T>, own_products<T>, own_gradients<T>, project<T>};
}

}  // namespace

extern const ContrastiveKernels contrastive_kernels;
const ContrastiveKernels contrastive_kernels = {{steps_of<float>(), steps_of<double>()}};

}  // namespace LEAFKERN_ISA
}  // namespace leafkern

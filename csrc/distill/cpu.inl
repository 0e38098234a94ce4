// The passes of the distillation losses, compiled once per instruction set into namespace LEAFKERN_ISA. No templates
// or inline functions of the standard library here: the linker might keep this object's copy for every caller.
#include <math.h>

#include "distill/distill.h"

namespace leafkern {
namespace LEAFKERN_ISA {
namespace {

#include "common/rows.inl"

// One row of one width of a stripe.
template <typename T>
struct Line {
    T* scores;
    const T* teacher;
    const T* right;
    const T* relative;  // both halves, scaled
    const T* previous;  // weights of the wider widths
    T* column_sums;
    T left, error_scale;
    T squares[kLanes<T>], sums[kLanes<T>];
};

// `n` columns from j on. Everything is loaded before anything is stored, so that no pointer is feared to alias.
template <typename T, int pass, int n>
void columns(Line<T>& line, int64_t j) {
    constexpr bool raw = pass != kDistillWeights, weighs = pass == kDistillFused || pass == kDistillWeights;
    T cosine[n], right[n], error[n], weight[n];
    for (int i = 0; i < n; ++i) cosine[i] = line.scores[j + i];
    for (int i = 0; i < n; ++i) right[i] = line.right[j + i];
    // Not by the product of both norms, which may leave the range of a float.
    if (raw)
        for (int i = 0; i < n; ++i) cosine[i] = cosine[i] * line.left * right[i];
    for (int i = 0; i < n; ++i) error[i] = cosine[i] - line.teacher[j + i];
    if (raw)
        for (int i = 0; i < n; ++i) line.squares[i] += error[i] * error[i];
    if (pass == kDistillScores)
        for (int i = 0; i < n; ++i) line.scores[j + i] = cosine[i];
    if (weighs) {
        for (int i = 0; i < n; ++i) error[i] *= line.error_scale;
        if (!raw)
            for (int i = 0; i < n; ++i) error[i] += line.relative[j + i];
        for (int i = 0; i < n; ++i) weight[i] = line.previous[j + i] + error[i] * line.left * right[i];
        for (int i = 0; i < n; ++i) error[i] *= cosine[i];
        for (int i = 0; i < n; ++i) line.scores[j + i] = weight[i];
        for (int i = 0; i < n; ++i) line.sums[i] += error[i];
        for (int i = 0; i < n; ++i) line.column_sums[j + i] += error[i];
    }
}

template <typename T, int pass>
void stripe(const DistillBlock& b, int64_t begin, int64_t end, bool mirrored, double* sums) {
    constexpr bool weighs = pass == kDistillFused || pass == kDistillWeights;
    const int64_t count = end - begin;
    const T none[kDistillStripe] = {};
    T column_sums[kDistillStripe], relative[kDistillStripe] = {};
    double loss = 0;
    for (int k = 0; k < b.widths; ++k) {
        const bool flat = b.flat && k == b.widths - 1;
        const T scale = flat ? 0 : static_cast<T>(b.relative_scale);
        const T* slopes = static_cast<const T*>(b.relative) + (b.relative ? k * b.width_stride : 0);
        for (int64_t j = 0; j < count; ++j) column_sums[j] = 0;
        for (int64_t row = 0; row < b.rows; ++row) {
            T* scores = static_cast<T*>(b.scores) + k * b.width_stride + row * b.row_stride + begin;
            Line<T> line{scores,
                         static_cast<const T*>(b.teacher) + row * b.teacher_stride + begin,
                         static_cast<const T*>(b.right) + k * b.norm_stride + begin,
                         relative,
                         k == 0 ? none : scores - b.width_stride,
                         column_sums,
                         static_cast<const T*>(b.left)[k * b.norm_stride + row],
                         flat ? 0 : static_cast<T>(b.error_scale),
                         {},
                         {}};
            if (pass == kDistillWeights) {
                const T* along = slopes + row * b.row_stride + begin;
                for (int64_t j = 0; j < count; ++j) relative[j] = scale * along[j];
                if (!mirrored)
                    for (int64_t j = 0; j < count; ++j)
                        relative[j] += scale * slopes[(begin + j) * b.row_stride + row];
            }
            int64_t j = 0;
            for (; j + kLanes<T> <= count; j += kLanes<T>) columns<T, pass, kLanes<T>>(line, j);
            for (; j < count; ++j) columns<T, pass, 1>(line, j);
            loss += sum(line.squares);
            if (weighs) sums[1 + k * b.rows + row] = sum(line.sums);
        }
        if (weighs && mirrored)
            for (int64_t j = 0; j < count; ++j) b.column_sums[k * b.norm_stride + begin + j] += column_sums[j];
    }
    sums[0] = mirrored ? 2 * loss : loss;
}

template <typename T>
void stripe_of(const DistillBlock& b, int64_t begin, int64_t end, bool mirrored, double* sums) {
    switch (b.pass) {
        case kDistillScores: return stripe<T, kDistillScores>(b, begin, end, mirrored, sums);
        case kDistillFused: return stripe<T, kDistillFused>(b, begin, end, mirrored, sums);
        default: return stripe<T, kDistillWeights>(b, begin, end, mirrored, sums);
    }
}

// Whether n(x) is a sign, whose gradient is exactly 0.
template <typename T>
bool width_of_one(int64_t width, T inverse) {
    return width == 1 && projected(inverse) > 0;
}

template <typename T>
void finish(const DistillFinish& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.rows) + row * a.stride;
        double along = 0;  // what of the row itself goes out of columns that all widths so far cover
        T by_target = 0;
        if (a.parts > 0) {
            const T inverse = static_cast<const T*>(a.whole_inverse)[row];
            double product = 0;
            int64_t column = 0;
            for (int p = 0; p < a.parts; ++p) {
                product += dot(x + column, static_cast<const T*>(a.targets[p]) + row * a.target_strides[p],
                               a.target_widths[p]);
                column += a.target_widths[p];
            }
            a.cosines[row] = product * inverse;
            along = a.slope * a.cosines[row] * projected(inverse);
            by_target = static_cast<T>(a.slope * inverse);
            if (width_of_one(a.width, inverse)) along = by_target = 0;
        }
        if (a.gradient == nullptr) continue;
        T* to = static_cast<T*>(a.gradient) + row * a.width;
        int64_t right = a.width;
        for (int k = 0; k <= a.widths; ++k) {
            const int64_t left = narrower(a.dims, a.widths, k - 1);
            if (along != 0) add(static_cast<T>(-along), x + left, right - left, to + left);
            if (k < a.widths)
                along += a.sums[k * a.norm_stride + row] *
                         projected(static_cast<const T*>(a.inverse)[k * a.norm_stride + row]);
            right = left;
        }
        int64_t column = 0;
        for (int p = 0; p < a.parts; ++p) {
            add(by_target, static_cast<const T*>(a.targets[p]) + row * a.target_strides[p], a.target_widths[p],
                to + column);
            column += a.target_widths[p];
        }
    }
}

// The sum over a row of (s * inverse - t)², or of (s * inverse - t) * s * inverse: one at a time, for which compilers
// find vectors.
template <typename T, bool squared>
double errors(const T* s, const T* t, T inverse, int64_t count) {
    T lanes[kLanes<T>] = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>)
        for (int l = 0; l < kLanes<T>; ++l) {
            const T unit = s[i + l] * inverse, error = unit - t[i + l];
            lanes[l] += error * (squared ? error : unit);
        }
    for (; i < count; ++i) {
        const T unit = s[i] * inverse, error = unit - t[i];
        lanes[0] += error * (squared ? error : unit);
    }
    return sum(lanes);
}

template <typename T>
void align(const DistillAlign& a, int64_t begin, int64_t end) {
    const int64_t width = a.width;
    for (int64_t row = begin; row < end; ++row) {
        const T* s = static_cast<const T*>(a.rows) + row * a.stride;
        const T* t = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
        // The gradient is by_error * (s * inverse - t) - by_student * s: where both terms are near each other, their
        // difference is exact.
        double inverse, by_error, by_student;
        if (a.kind == kCosine) {
            const T student = inverse_norm<T>(sum_of_squares(s, width));
            const T teacher = inverse_norm<T>(sum_of_squares(t, width));
            const double cosine = dot(s, t, width) * student * teacher;
            a.distances[row] = 1 - cosine;
            inverse = 0;
            by_error = a.scale * student * teacher;
            by_student = -a.scale * cosine * projected(student);
            if (width_of_one(width, student)) by_error = by_student = 0;
        } else {
            const T student = a.normalize ? inverse_norm<T>(sum_of_squares(s, width)) : 1;
            const double square = errors<T, true>(s, t, student, width), norm = sqrt(square);
            a.distances[row] = a.kind == kL2 ? norm : square;
            const double slope = a.scale * (a.kind != kL2 ? 2 : norm == 0 ? 0 : 1 / norm);
            inverse = student;
            by_error = slope * student;
            by_student = a.normalize ? slope * errors<T, false>(s, t, student, width) * projected(student) : 0;
            if (a.normalize && width_of_one(width, student)) by_error = by_student = 0;
        }
        if (a.gradient == nullptr) continue;
        T* to = static_cast<T*>(a.gradient) + row * width;
        const T scale = static_cast<T>(inverse), of_error = static_cast<T>(by_error), of_row = static_cast<T>(by_student);
        for (int64_t i = 0; i < width; ++i) to[i] = of_error * (s[i] * scale - t[i]) - of_row * s[i];
    }
}

}  // namespace

extern const DistillKernels distill_kernels;
const DistillKernels distill_kernels = {
    {{stripe_of<float>, finish<float>, align<float>},
     {stripe_of<double>, finish<double>, align<double>}}};

}  // namespace LEAFKERN_ISA
}  // namespace leafkern

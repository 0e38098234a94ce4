// Python's door to the kernels: raw pointers, sizes and thread counts in, nothing owned, the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/memory.h"
#include "common/rows.h"
#include "contrastive/contrastive.h"
#include "distill/distill.h"
#include "quantization/quantization.h"
#include "relative/relative.h"
#include "retrieval/search.h"

namespace py = pybind11;
using namespace leafkern;

namespace {

struct Kernels {
    const RowKernels* rows;
    const SearchKernels* search;
    const RelativeKernels* relative;
    const DistillKernels* distill;
    const ContrastiveKernels* contrastive;
    const QuantizationKernels* quantization;
};

#define LEAFKERN_KERNELS(isa) \
    {&isa::row_kernels,     &isa::search_kernels,      &isa::relative_kernels, \
     &isa::distill_kernels, &isa::contrastive_kernels, &isa::quantization_kernels}

Kernels chosen = LEAFKERN_KERNELS(portable);

py::list instruction_sets() {
    py::list names;
    names.append("portable");
    if (has_isa_avx2()) names.append("avx2");
    return names;
}

void select_isa(const std::string& name) {
#if LEAFKERN_X86
    if (name == "avx2" && has_isa_avx2()) {
        chosen = LEAFKERN_KERNELS(avx2);
        return;
    }
#endif
    if (name != "portable") throw std::invalid_argument("no such instruction set here: " + name);
    chosen = LEAFKERN_KERNELS(portable);
}

// type, values, rows, dim, row stride, stride, threads
using VectorsTuple = std::tuple<int, uintptr_t, int64_t, int64_t, int64_t, int64_t, int>;

Vectors vectors_of(const VectorsTuple& given) {
    const auto [type, values, rows, dim, row_stride, stride, threads] = given;
    if (type < 0 || type > 2 || rows < 0 || dim < 0 || threads < 1)
        throw std::invalid_argument("quantize: type, rows, dim or threads out of range");
    return {static_cast<FloatType>(type), reinterpret_cast<const void*>(values), rows, dim, row_stride, stride};
}

SearchArguments search_arguments(int form, int dim, int flip, int64_t queries, int64_t count, int64_t stride, int k,
                                 int threads) {
    if (form < 0 || form > static_cast<int>(Form::float16) || dim < 1 || dim > kMaxDim || k < 1 || k > kMaxK ||
        k > count || queries < 0)
        throw std::invalid_argument("search: form, dim, k, count or queries out of range");
    SearchArguments a{};
    a.form = static_cast<Form>(form);
    a.dim = dim;
    a.flip = static_cast<uint8_t>(flip);
    a.queries = queries;
    a.count = count;
    a.stride = stride;
    a.k = k;
    a.threads = threads;
    return a;
}

// form, dim, queries, stride, candidates of each, k, threads
using RescoreTuple = std::tuple<int, int, int64_t, int64_t, int64_t, int, int>;

RescoreArguments rescore_arguments(const RescoreTuple& given) {
    const auto [form, dim, queries, stride, count, k, threads] = given;
    if (form < static_cast<int>(Form::float32) || form >= kForms || dim < 1 || queries < 0 || k < 1 || k > count)
        throw std::invalid_argument("rescore: form, dim, queries, k or candidates out of range");
    RescoreArguments a{};
    a.form = static_cast<Form>(form);
    a.dim = dim;
    a.queries = queries;
    a.stride = stride;
    a.count = count;
    a.k = k;
    a.threads = threads;
    return a;
}

RelativeArguments relative_arguments(bool is_double, int64_t batch, int widths, int threads) {
    if (batch < 3 || batch > kMaxBatch || widths < 1) throw std::invalid_argument("relative: batch or widths out of range");
    RelativeArguments a{};
    a.is_double = is_double;
    a.batch = batch;
    a.widths = widths;
    a.threads = threads;
    return a;
}

void check_dims(const std::vector<int64_t>& dims, int64_t width, int64_t count) {
    bool falling = count >= 0;
    for (const int64_t dim : dims) {
        falling = falling && dim >= 1 && dim <= width;
        width = dim - 1;
    }
    if (!falling) throw std::invalid_argument("rows: dims or count out of range");
}

// is double, threads, x, rows, stride, inverse, inverse stride
using RowsTuple = std::tuple<bool, int, uintptr_t, int64_t, int64_t, uintptr_t, int64_t>;

Rows rows_of(const RowsTuple& given, const std::vector<int64_t>& dims) {
    const auto [is_double, threads, x, rows, stride, inverse, inverse_stride] = given;
    if (dims.empty()) throw std::invalid_argument("rows: no dims");
    check_dims(dims, dims[0], rows);
    return {is_double, threads, reinterpret_cast<const void*>(x), rows, stride, dims.data(),
            static_cast<int64_t>(dims.size()), reinterpret_cast<void*>(inverse), inverse_stride};
}

// raw, weights, inverse, count, stride, inverse stride, ids, maskable, partial, sums
using PartTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t, bool, uintptr_t,
                             uintptr_t>;

ContrastivePart contrastive_part(const PartTuple& given) {
    const auto [raw, weights, inverse, count, stride, inverse_stride, ids, maskable, partial, sums] = given;
    ContrastivePart part{};
    part.raw = reinterpret_cast<const void*>(raw);
    part.weights = reinterpret_cast<void*>(weights);
    part.inverse = reinterpret_cast<const void*>(inverse);
    part.count = count;
    part.stride = stride;
    part.inverse_stride = inverse_stride;
    part.ids = reinterpret_cast<const int64_t*>(ids);
    part.maskable = maskable;
    part.partial = reinterpret_cast<void*>(partial);
    part.sums = reinterpret_cast<double*>(sums);
    return part;
}

// y, count, row stride, stride, raw, inverse, weights, row gradient, its stride, gradient, its stride
using OwnTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t,
                            uintptr_t, int64_t>;
// own positive of the first row, ids, margin, gamma, detach focal
using InfoNceTuple = std::tuple<int64_t, uintptr_t, std::optional<double>, double, bool>;

ContrastiveOwn contrastive_own(const OwnTuple& given) {
    const auto [y, count, row_stride, stride, raw, inverse, weights, row_gradient, row_gradient_stride, gradient,
                gradient_stride] = given;
    ContrastiveOwn own{};
    own.y = reinterpret_cast<const void*>(y);
    own.count = count;
    own.row_stride = row_stride;
    own.stride = stride;
    own.raw = reinterpret_cast<void*>(raw);
    own.inverse = reinterpret_cast<void*>(inverse);
    own.weights = reinterpret_cast<const void*>(weights);
    own.row_gradient = reinterpret_cast<void*>(row_gradient);
    own.row_gradient_stride = row_gradient_stride;
    own.gradient = reinterpret_cast<void*>(gradient);
    own.gradient_stride = gradient_stride;
    return own;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def("instruction_sets", &instruction_sets, "Instruction sets that this CPU can run, best last.");
    module.def("select_isa", &select_isa, py::arg("name"));
    module.def("isa", [] { return chosen.search->isa; }, "The instruction set that serves.");
    module.def("advise_huge",
               [](uintptr_t data, size_t bytes) { advise_huge(reinterpret_cast<void*>(data), bytes); });
    module.def("inverse_norms", [](const RowsTuple& matrix, const std::vector<int64_t>& dims) {
        const Rows m = rows_of(matrix, dims);
        py::gil_scoped_release released;
        inverse_norms(*chosen.rows, m);
    });

    // Whether every entry is finite and stays so.
    module.def("encode", [](const VectorsTuple& given, int form, int flip, uintptr_t low, uintptr_t step,
                            uintptr_t codes) {
        const Vectors x = vectors_of(given);
        if (form < 0 || form > 3) throw std::invalid_argument("encode: form out of range");
        const Codes c{static_cast<CodeForm>(form), static_cast<uint8_t>(flip), reinterpret_cast<const float*>(low),
                      reinterpret_cast<const float*>(step), reinterpret_cast<uint8_t*>(codes)};
        py::gil_scoped_release released;
        return encode(*chosen.quantization, x, c, std::get<6>(given));
    });
    // Whether every entry is finite; found: (2, dim), smallest and largest.
    module.def("extremes", [](const VectorsTuple& given, uintptr_t found) {
        const Vectors x = vectors_of(given);
        const int threads = std::get<6>(given);
        std::vector<float> spare(static_cast<size_t>(threads) * 2 * x.dim);
        py::gil_scoped_release released;
        return extremes(*chosen.quantization, x, threads, reinterpret_cast<float*>(found), spare.data());
    });

    module.attr("MAX_DIM") = kMaxDim;
    module.attr("MAX_K") = kMaxK;

    module.def("fold", [](uintptr_t w, int64_t rows, int64_t dim, uintptr_t u, uintptr_t a) {
        if (rows < 0 || dim < 0) throw std::invalid_argument("fold: rows or dim out of range");
        py::gil_scoped_release released;
        chosen.search->fold(reinterpret_cast<const float*>(w), rows, dim, reinterpret_cast<int8_t*>(u),
                            reinterpret_cast<float*>(a));
    });
    module.def("search_workspace",
               [](int form, int dim, int flip, int64_t queries, int64_t count, int64_t stride, int k, int threads) {
                   return search_workspace(*chosen.search, search_arguments(form, dim, flip, queries, count, stride, k, threads));
               });
    module.def("search", [](int form, int dim, int flip, int64_t queries, int64_t count, int64_t stride, int k,
                            int threads, uintptr_t given, uintptr_t rows, uintptr_t allowed, uintptr_t scores,
                            uintptr_t ids, uintptr_t workspace, size_t workspace_bytes) {
        SearchArguments a = search_arguments(form, dim, flip, queries, count, stride, k, threads);
        const SearchKernels& kernels = *chosen.search;
        if (workspace_bytes < search_workspace(kernels, a)) throw std::invalid_argument("search: workspace too small");
        a.given = reinterpret_cast<const void*>(given);
        a.rows = reinterpret_cast<const uint8_t*>(rows);
        a.allowed = reinterpret_cast<const uint8_t*>(allowed);
        a.scores = reinterpret_cast<int32_t*>(scores);
        a.ids = reinterpret_cast<int64_t*>(ids);
        py::gil_scoped_release released;
        return search(kernels, a, reinterpret_cast<unsigned char*>(workspace));
    });

    module.def("rescore_workspace", [](const RescoreTuple& sizes) {
        return rescore_workspace(*chosen.search, rescore_arguments(sizes));
    });
    module.def("rescore", [](const RescoreTuple& sizes, uintptr_t given, uintptr_t bias, uintptr_t rows,
                             uintptr_t candidates, uintptr_t scores, uintptr_t ids, uintptr_t workspace,
                             size_t workspace_bytes) {
        RescoreArguments a = rescore_arguments(sizes);
        const SearchKernels& kernels = *chosen.search;
        if (workspace_bytes < rescore_workspace(kernels, a))
            throw std::invalid_argument("rescore: workspace too small");
        a.given = reinterpret_cast<const float*>(given);
        a.bias = reinterpret_cast<const float*>(bias);
        a.rows = reinterpret_cast<const uint8_t*>(rows);
        a.candidates = reinterpret_cast<const int64_t*>(candidates);
        a.scores = reinterpret_cast<int32_t*>(scores);
        a.ids = reinterpret_cast<int64_t*>(ids);
        py::gil_scoped_release released;
        return rescore(kernels, a, reinterpret_cast<unsigned char*>(workspace));
    });

    module.attr("MAX_BATCH") = kMaxBatch;
    module.def("relative_workspace", [](bool is_double, int64_t batch, int widths, int threads) {
        return relative_workspace(*chosen.relative, relative_arguments(is_double, batch, widths, threads));
    });
    module.def("relative", [](bool is_double, int64_t batch, int widths, int threads, double margin, double min_gap,
                              bool reference_ties, uintptr_t student, uintptr_t teacher, uintptr_t loss,
                              uintptr_t gradient, uintptr_t workspace, size_t workspace_bytes) {
        RelativeArguments a = relative_arguments(is_double, batch, widths, threads);
        const RelativeKernels& kernels = *chosen.relative;
        if (workspace_bytes < relative_workspace(kernels, a))
            throw std::invalid_argument("relative: workspace too small");
        a.margin = margin;
        a.min_gap = min_gap;
        a.reference_ties = reference_ties;
        a.student = reinterpret_cast<const void*>(student);
        a.teacher = reinterpret_cast<const void*>(teacher);
        a.loss = reinterpret_cast<double*>(loss);
        a.gradient = reinterpret_cast<void*>(gradient);
        py::gil_scoped_release released;
        relative(kernels, a, reinterpret_cast<unsigned char*>(workspace));
    });

    module.attr("DISTILL_SCORES") = static_cast<int>(kDistillScores);
    module.attr("DISTILL_FUSED") = static_cast<int>(kDistillFused);
    module.attr("DISTILL_WEIGHTS") = static_cast<int>(kDistillWeights);
    // sizes: rows, columns; strides: of widths and rows of scores, of rows of teacher, of widths of norms and sums.
    module.def("distill_block", [](bool is_double, int pass, int widths, const std::vector<int64_t>& sizes,
                                   const std::vector<int64_t>& strides, bool mirrored, double error_scale,
                                   double relative_scale, bool flat, int threads, uintptr_t scores, uintptr_t teacher,
                                   uintptr_t relative, uintptr_t left, uintptr_t right, uintptr_t row_sums,
                                   uintptr_t column_sums, uintptr_t loss) {
        if (widths < 1 || pass < kDistillScores || pass > kDistillWeights || sizes.size() != 2 || strides.size() != 4 ||
            sizes[0] < 0 || sizes[1] < 0 || (mirrored && sizes[0] > sizes[1]))
            throw std::invalid_argument("distill: pass, widths or sizes out of range");
        const DistillBlock block{static_cast<DistillPass>(pass), widths, sizes[0], sizes[1], strides[0], strides[1],
                                 strides[2], reinterpret_cast<void*>(scores), reinterpret_cast<const void*>(teacher),
                                 reinterpret_cast<const void*>(relative), mirrored,
                                 reinterpret_cast<const void*>(left), reinterpret_cast<const void*>(right), strides[3],
                                 error_scale, relative_scale, flat, reinterpret_cast<double*>(row_sums),
                                 reinterpret_cast<double*>(column_sums), reinterpret_cast<double*>(loss)};
        const DistillSteps& steps = chosen.distill->steps[is_double];
        std::vector<double> workspace(distill_workspace(block));
        py::gil_scoped_release released;
        distill_block(steps, block, workspace.data(), threads);
    });
    // targets: address, stride and width of each part, or none without a cosine loss, whose sum is returned.
    module.def("distill_finish", [](bool is_double, int64_t count, int64_t width, const std::vector<int64_t>& dims,
                                    const std::vector<uintptr_t>& targets, const std::vector<int64_t>& target_strides,
                                    const std::vector<int64_t>& target_widths, double slope, int64_t norm_stride,
                                    int threads, uintptr_t rows, int64_t stride, uintptr_t inverse, uintptr_t sums,
                                    uintptr_t whole_inverse, uintptr_t gradient) {
        check_dims(dims, width, count);
        int64_t side_by_side = 0;
        for (const int64_t each : target_widths) side_by_side += each;
        if (targets.size() != target_strides.size() || targets.size() != target_widths.size() ||
            (!targets.empty() && side_by_side != width))
            throw std::invalid_argument("distill: targets are not as wide as the rows");
        std::vector<const void*> addresses;
        for (const uintptr_t target : targets) addresses.push_back(reinterpret_cast<const void*>(target));
        std::vector<double> cosines(targets.empty() ? 0 : count);
        const DistillFinish arguments{reinterpret_cast<const void*>(rows), stride, count, width, dims.data(),
                                      static_cast<int>(dims.size()), reinterpret_cast<const void*>(inverse),
                                      reinterpret_cast<const double*>(sums), norm_stride,
                                      static_cast<int>(targets.size()), addresses.data(), target_strides.data(),
                                      target_widths.data(), reinterpret_cast<const void*>(whole_inverse), slope,
                                      cosines.data(), reinterpret_cast<void*>(gradient)};
        const DistillSteps& steps = chosen.distill->steps[is_double];
        double total = 0;
        {
            py::gil_scoped_release released;
            distill_finish(steps, arguments, threads);
        }
        for (const double cosine : cosines) total += cosine;
        return total;
    });
    // Returns the sum of the distances.
    module.def("distill_align", [](bool is_double, int kind, bool normalize, int64_t count, int64_t width, double scale,
                                   int threads, uintptr_t rows, int64_t stride, uintptr_t teacher,
                                   int64_t teacher_stride, uintptr_t gradient) {
        if (kind < kL2Squared || kind > kCosine || count < 0 || width < 0)
            throw std::invalid_argument("align: kind or sizes out of range");
        std::vector<double> distances(count);
        const DistillAlign arguments{static_cast<AlignmentKind>(kind), normalize, count, width,
                                     reinterpret_cast<const void*>(rows), reinterpret_cast<const void*>(teacher),
                                     stride, teacher_stride, scale, distances.data(),
                                     reinterpret_cast<void*>(gradient)};
        const DistillSteps& steps = chosen.distill->steps[is_double];
        double total = 0;
        {
            py::gil_scoped_release released;
            distill_align(steps, arguments, threads);
        }
        for (const double distance : distances) total += distance;
        return total;
    });

    module.attr("GROUP_ROWS") = kGroup;
    module.def("contrastive_rows", [](bool is_double, bool gradient, int threads, int64_t rows, uintptr_t inverse,
                                      const std::vector<PartTuple>& parts, double temperature, double share,
                                      uintptr_t losses, uintptr_t sums, int64_t widths, int64_t width_stride,
                                      std::optional<InfoNceTuple> nce, uintptr_t teacher, double teacher_temperature) {
        ContrastiveRows a{};
        if (parts.size() != 3) throw std::invalid_argument("contrastive_rows: expected three parts");
        a.is_double = is_double;
        a.gradient = gradient;
        a.threads = threads;
        a.rows = rows;
        a.inverse = reinterpret_cast<const void*>(inverse);
        for (int p = 0; p < 3; ++p) a.parts[p] = contrastive_part(parts[p]);
        a.temperature = temperature;
        a.share = share;
        a.losses = reinterpret_cast<double*>(losses);
        a.sums = reinterpret_cast<double*>(sums);
        a.widths = widths;
        a.width_stride = width_stride;
        if (nce) {
            const auto [own, ids, margin, gamma, detach_focal] = *nce;
            if (own < 0 || own + rows > a.parts[0].count)
                throw std::invalid_argument("contrastive_rows: own positives beyond the first part");
            a.own = own;
            a.ids = reinterpret_cast<const int64_t*>(ids);
            a.has_margin = margin.has_value();
            a.margin = margin.value_or(0);
            a.gamma = gamma;
            a.detach_focal = detach_focal;
        }
        if (!nce && !teacher) throw std::invalid_argument("contrastive_rows: neither positives nor a teacher");
        a.teacher = reinterpret_cast<const void*>(teacher);
        a.teacher_temperature = teacher_temperature;
        py::gil_scoped_release released;
        return contrastive_rows(*chosen.contrastive, a);
    });
    module.def("own_products", [](const RowsTuple& matrix, const std::vector<int64_t>& dims, const OwnTuple& own) {
        const Rows m = rows_of(matrix, dims);
        const ContrastiveOwn o = contrastive_own(own);
        py::gil_scoped_release released;
        own_products(*chosen.contrastive, m, o);
    });
    module.def("own_gradients", [](const RowsTuple& matrix, const std::vector<int64_t>& dims, const OwnTuple& own) {
        const Rows m = rows_of(matrix, dims);
        const ContrastiveOwn o = contrastive_own(own);
        py::gil_scoped_release released;
        own_gradients(*chosen.contrastive, m, o);
    });
    module.def("project", [](const RowsTuple& matrix, const std::vector<int64_t>& dims, uintptr_t gradient,
                             int64_t stride, uintptr_t sums, int64_t sums_stride) {
        const Rows m = rows_of(matrix, dims);
        const ContrastiveProjection projection{reinterpret_cast<void*>(gradient), stride,
                                               reinterpret_cast<const double*>(sums), sums_stride};
        py::gil_scoped_release released;
        project(*chosen.contrastive, m, projection);
    });
}

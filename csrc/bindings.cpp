// Python's door to the kernels: raw pointers, sizes and thread counts in, nothing owned, the GIL released.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "relative/relative.h"
#include "retrieval/search.h"

namespace py = pybind11;
using namespace leafkern;

namespace {

struct Kernels {
    const SearchKernels* search;
    const RelativeKernels* relative;
};

Kernels chosen = {&portable::search_kernels, &portable::relative_kernels};

py::list instruction_sets() {
    py::list names;
    names.append("portable");
    if (has_isa_avx2()) names.append("avx2");
    return names;
}

void select_isa(const std::string& name) {
#if LEAFKERN_X86
    if (name == "avx2" && has_isa_avx2()) {
        chosen = {&avx2::search_kernels, &avx2::relative_kernels};
        return;
    }
#endif
    if (name != "portable") throw std::invalid_argument("no such instruction set here: " + name);
    chosen = {&portable::search_kernels, &portable::relative_kernels};
}

SearchArguments search_arguments(int form, int dim, int flip, int64_t queries, int64_t count, int64_t stride, int k,
                          int threads) {
    if (form < 0 || form > 3 || dim < 1 || dim > kMaxDim || k < 1 || k > kMaxK || k > count || queries < 0)
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

RelativeArguments relative_arguments(bool is_double, int64_t batch, int widths, int threads) {
    if (batch < 3 || batch > kMaxBatch || widths < 1) throw std::invalid_argument("relative: batch or widths out of range");
    RelativeArguments a{};
    a.is_double = is_double;
    a.batch = batch;
    a.widths = widths;
    a.threads = threads;
    return a;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def("instruction_sets", &instruction_sets, "Instruction sets that this CPU can run, best last.");
    module.def("select_isa", &select_isa, py::arg("name"));
    module.def("isa", [] { return chosen.search->isa; }, "The instruction set that serves.");
    module.attr("MAX_DIM") = kMaxDim;
    module.attr("MAX_K") = kMaxK;

    module.def("search_workspace",
               [](int form, int dim, int flip, int64_t queries, int64_t count, int64_t stride, int k, int threads) {
                   return search_workspace(*chosen.search, search_arguments(form, dim, flip, queries, count, stride, k, threads));
               });
    module.def("search", [](int form, int dim, int flip, int64_t queries, int64_t count, int64_t stride, int k,
                            int threads, uintptr_t u, uintptr_t rows, uintptr_t scores, uintptr_t ids,
                            uintptr_t workspace, size_t workspace_bytes) {
        SearchArguments a = search_arguments(form, dim, flip, queries, count, stride, k, threads);
        const SearchKernels& kernels = *chosen.search;
        if (workspace_bytes < search_workspace(kernels, a)) throw std::invalid_argument("search: workspace too small");
        a.u = reinterpret_cast<const int8_t*>(u);
        a.rows = reinterpret_cast<const uint8_t*>(rows);
        a.scores = reinterpret_cast<int32_t*>(scores);
        a.ids = reinterpret_cast<int64_t*>(ids);
        py::gil_scoped_release released;
        search(kernels, a, reinterpret_cast<unsigned char*>(workspace));
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
}

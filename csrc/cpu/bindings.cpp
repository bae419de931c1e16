// Python bindings: tensors cross as addresses, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <optional>

#include "head_pass.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

using Implementation = void (*)(const rlvr::HeadPass&);

struct Selected {
    const char* name;
    Implementation run;
};

Selected select_instruction_set(const std::string& wanted) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if ((wanted == "auto" || wanted == "avx512") && avx512) return {"avx512", rlvr::head_pass_avx512};
    if ((wanted == "auto" || wanted == "avx2") && avx2) return {"avx2", rlvr::head_pass_avx2};
#endif
    if (wanted == "auto" || wanted == "baseline") return {"baseline", rlvr::head_pass_baseline};
    throw py::value_error("instruction_set " + wanted + " cannot run on this processor");
}

template <class T>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

// A Python function (first, count) as the pass's merge; what it raises waits until the pass's threads are done.
struct Merge {
    py::function function;
    std::exception_ptr failure;
    static bool call(void* context, int64_t first, int64_t count) {
        py::gil_scoped_acquire locked;
        auto& self = *static_cast<Merge*>(context);
        try {
            self.function(first, count);
            return true;
        } catch (...) {
            self.failure = std::current_exception();
            return false;
        }
    }
};

void head_pass(int dtype, Address hidden, Address weight, Address bias, Address tokens, int64_t n_tokens,
               int64_t vocabulary, int64_t width, float temperature, float softcap, Address results, Address sums,
               Address coefficients, Address cu_seqlens, int64_t n_responses, std::optional<py::function> merge,
               int n_threads, const std::string& instruction_set) {
    rlvr::HeadPass a{};
    a.dtype = static_cast<rlvr::DType>(dtype);
    a.hidden = pointer<const void>(hidden);
    a.weight = pointer<const void>(weight);
    a.bias = pointer<const float>(bias);
    a.tokens = pointer<const int64_t>(tokens);
    a.n_tokens = n_tokens;
    a.vocabulary = vocabulary;
    a.width = width;
    a.inverse_temperature = static_cast<float>(1.0 / temperature);
    a.softcap = softcap;
    a.n_threads = n_threads;
    float* const columns = pointer<float>(results);
    float** const outputs[] = {&a.logp, &a.lse, &a.entropy, &a.sum_p_sq, &a.score_sq, &a.off_mass};
    for (int i = 0; i < 6; ++i) *outputs[i] = columns + i * n_tokens;
    a.sums = pointer<float>(sums);
    a.coefficients = pointer<const float>(coefficients);
    a.cu_seqlens = pointer<const int64_t>(cu_seqlens);
    a.n_responses = n_responses;
    Merge merging;
    if (merge) {
        merging.function = *merge;
        a.merge = Merge::call;
        a.merge_context = &merging;
    }
    const auto run = select_instruction_set(instruction_set).run;
    {
        py::gil_scoped_release unlocked;
        run(a);
    }
    if (merging.failure) std::rethrow_exception(merging.failure);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native CPU kernels. Arguments are addresses of contiguous memory, validated by the caller.";
    module.def("instruction_set", [](const std::string& wanted) { return std::string(select_instruction_set(wanted).name); },
               py::arg("wanted") = "auto");
    module.def("head_pass", &head_pass, py::arg("dtype"), py::arg("hidden"), py::arg("weight"), py::arg("bias"),
               py::arg("tokens"), py::arg("n_tokens"), py::arg("vocabulary"), py::arg("width"), py::arg("temperature"),
               py::arg("softcap"), py::arg("results"), py::arg("sums"), py::arg("coefficients"), py::arg("cu_seqlens"),
               py::arg("n_responses"), py::arg("merge"), py::arg("n_threads"), py::arg("instruction_set") = "auto");
}

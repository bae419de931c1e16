// Python bindings: tensors cross as addresses, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <optional>
#include <tuple>
#include <vector>

#include "fold.h"
#include "head_gradient.h"
#include "head_pass.h"
#include "segmented.h"
#include "witness.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

struct InstructionSet {
    const char* name;
    void (*head_pass)(const rlvr::HeadPass&);
    void (*head_gradient)(const rlvr::HeadGradient&);
    void (*segmented)(const rlvr::Segmented&);
    void (*fold_rows)(const rlvr::FoldRows&);
};

InstructionSet select_instruction_set(const std::string& wanted) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if ((wanted == "auto" || wanted == "avx512") && avx512)
        return {"avx512", rlvr::head_pass_avx512, rlvr::head_gradient_avx512, rlvr::segmented_avx512, rlvr::fold_rows_avx512};
    if ((wanted == "auto" || wanted == "avx2") && avx2)
        return {"avx2", rlvr::head_pass_avx2, rlvr::head_gradient_avx2, rlvr::segmented_avx2, rlvr::fold_rows_avx2};
#endif
    if (wanted == "auto" || wanted == "baseline")
        return {"baseline", rlvr::head_pass_baseline, rlvr::head_gradient_baseline, rlvr::segmented_baseline, rlvr::fold_rows_baseline};
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

rlvr::HeadInputs head_inputs(int dtype, Address hidden, Address weight, Address bias, Address tokens, int64_t n_tokens,
                             int64_t vocabulary, int64_t width, float temperature, float softcap, int n_threads) {
    return {static_cast<rlvr::DType>(dtype), pointer<const void>(hidden), pointer<const void>(weight),
            pointer<const float>(bias), pointer<const int64_t>(tokens), n_tokens, vocabulary, width,
            static_cast<float>(1.0 / temperature), softcap, n_threads};
}

void head_pass(const rlvr::HeadInputs& inputs, Address results, Address sums, Address coefficients, Address cu_seqlens,
               int64_t n_responses, std::optional<py::function> merge, const std::string& instruction_set) {
    rlvr::HeadPass a{};
    static_cast<rlvr::HeadInputs&>(a) = inputs;
    float* const columns = pointer<float>(results);
    float** const outputs[] = {&a.logp, &a.lse, &a.entropy, &a.sum_p_sq, &a.score_sq, &a.off_mass};
    for (int i = 0; i < 6; ++i) *outputs[i] = columns + i * a.n_tokens;
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
    const auto run = select_instruction_set(instruction_set).head_pass;
    {
        py::gil_scoped_release unlocked;
        run(a);
    }
    if (merging.failure) std::rethrow_exception(merging.failure);
}

void head_gradient(const rlvr::HeadInputs& inputs, Address lse, Address entropy, Address off_mass, Address grad_logp,
                   Address grad_entropy, Address grad_hidden, Address grad_weight, Address grad_bias,
                   const std::string& instruction_set) {
    rlvr::HeadGradient a{};
    static_cast<rlvr::HeadInputs&>(a) = inputs;
    a.lse = pointer<const float>(lse);
    a.entropy = pointer<const float>(entropy);
    a.off_mass = pointer<const float>(off_mass);
    a.grad_logp = pointer<const float>(grad_logp);
    a.grad_entropy = pointer<const float>(grad_entropy);
    a.grad_hidden = pointer<float>(grad_hidden);
    a.grad_weight = pointer<float>(grad_weight);
    a.grad_bias = pointer<float>(grad_bias);
    const auto run = select_instruction_set(instruction_set).head_gradient;
    py::gil_scoped_release unlocked;
    run(a);
}

using PieceTuple = std::tuple<Address, Address, int64_t, int64_t, int64_t, int64_t>;

void segmented(int dtype, const std::vector<PieceTuple>& pieces, int64_t n_responses, int64_t d_out, int64_t d_in,
               Address direction, Address gradient, Address gram, Address dots, int n_threads,
               const std::string& instruction_set) {
    std::vector<rlvr::Piece> own;
    own.reserve(pieces.size());
    for (const auto& [b, a, rows, b_stride, a_stride, response] : pieces)
        own.push_back({pointer<const void>(b), pointer<const void>(a), rows, b_stride, a_stride, response});
    rlvr::Segmented a{};
    a.dtype = static_cast<rlvr::DType>(dtype);
    a.pieces = own.data();
    a.n_pieces = static_cast<int64_t>(own.size());
    a.n_responses = n_responses;
    a.d_out = d_out;
    a.d_in = d_in;
    a.direction = pointer<const float>(direction);
    a.gradient = pointer<float>(gradient);
    a.gram = pointer<double>(gram);
    a.dots = pointer<double>(dots);
    a.n_threads = n_threads;
    const auto run = select_instruction_set(instruction_set).segmented;
    py::gil_scoped_release unlocked;
    run(a);
}

void fold_rows(int dtype, Address x, int64_t n_rows, int64_t width, int64_t stride, int64_t first, int64_t k,
               uint64_t salt, Address folded, int n_threads, const std::string& instruction_set) {
    const rlvr::FoldRows a{static_cast<rlvr::DType>(dtype), pointer<const void>(x), n_rows, width, stride, first, k, salt,
                           pointer<float>(folded), n_threads};
    const auto run = select_instruction_set(instruction_set).fold_rows;
    py::gil_scoped_release unlocked;
    run(a);
}

void outer_entries(int b_dtype, Address b, int64_t b_stride, int a_dtype, Address a, int64_t a_stride, int64_t n_rows,
                   Address rows, Address columns, int64_t n_entries, Address seen, Address size) {
    rlvr::outer_entries({static_cast<rlvr::DType>(b_dtype), static_cast<rlvr::DType>(a_dtype), pointer<const void>(b),
                         pointer<const void>(a), n_rows, b_stride, a_stride, n_entries, pointer<const int64_t>(rows),
                         pointer<const int64_t>(columns), pointer<double>(seen), pointer<double>(size)});
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native CPU kernels. Arguments are addresses of contiguous memory, validated by the caller.";
    module.def("instruction_set", [](const std::string& wanted) { return std::string(select_instruction_set(wanted).name); },
               py::arg("wanted") = "auto");
    py::class_<rlvr::HeadInputs>(module, "HeadInputs", py::module_local())
        .def(py::init(&head_inputs), py::arg("dtype"), py::arg("hidden"), py::arg("weight"), py::arg("bias"),
             py::arg("tokens"), py::arg("n_tokens"), py::arg("vocabulary"), py::arg("width"), py::arg("temperature"),
             py::arg("softcap"), py::arg("n_threads"));
    module.def("head_pass", &head_pass, py::arg("inputs"), py::arg("results"), py::arg("sums"), py::arg("coefficients"),
               py::arg("cu_seqlens"), py::arg("n_responses"), py::arg("merge"), py::arg("instruction_set") = "auto");
    module.def("head_gradient", &head_gradient, py::arg("inputs"), py::arg("lse"), py::arg("entropy"),
               py::arg("off_mass"), py::arg("grad_logp"), py::arg("grad_entropy"), py::arg("grad_hidden"),
               py::arg("grad_weight"), py::arg("grad_bias"), py::arg("instruction_set") = "auto");
    module.def("segmented", &segmented, py::arg("dtype"), py::arg("pieces"), py::arg("n_responses"), py::arg("d_out"),
               py::arg("d_in"), py::arg("direction"), py::arg("gradient"), py::arg("gram"), py::arg("dots"),
               py::arg("n_threads"), py::arg("instruction_set") = "auto");
    module.def("fold_rows", &fold_rows, py::arg("dtype"), py::arg("x"), py::arg("n_rows"), py::arg("width"),
               py::arg("stride"), py::arg("first"), py::arg("k"), py::arg("salt"), py::arg("folded"),
               py::arg("n_threads"), py::arg("instruction_set") = "auto");
    module.def("outer_entries", &outer_entries, py::arg("b_dtype"), py::arg("b"), py::arg("b_stride"),
               py::arg("a_dtype"), py::arg("a"), py::arg("a_stride"), py::arg("n_rows"), py::arg("rows"),
               py::arg("columns"), py::arg("n_entries"), py::arg("seen"), py::arg("size"));
}

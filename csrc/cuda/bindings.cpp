// Python bindings: tensors cross as addresses, the stream as its handle, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include "row_pass.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

void row_pass(int logits_dtype, Address logits, int64_t logits_stride, Address tokens, int block_dtype, Address block,
              int64_t block_stride, int64_t rows, int64_t vocabulary, float inverse_temperature, float softcap,
              Address results, int device, Address stream, int smallest_cluster) {
    rlvr::RowPass a{};
    a.logits = pointer<const void>(logits);
    a.logits_stride = logits_stride;
    a.tokens = pointer<const int64_t>(tokens);
    a.block = pointer<void>(block);
    a.block_stride = block_stride;
    a.results = pointer<float>(results);
    a.rows = rows;
    a.vocabulary = static_cast<int>(vocabulary);
    a.inverse_temperature = inverse_temperature;
    a.softcap = softcap;
    py::gil_scoped_release unlocked;
    rlvr::run_row_pass(a, static_cast<rlvr::DType>(logits_dtype), static_cast<rlvr::DType>(block_dtype), device,
                       pointer<void>(stream), smallest_cluster);
}

py::tuple row_layout(int dtype, int64_t vocabulary, bool second_sweep, int device, int smallest_cluster) {
    const rlvr::Layout layout = rlvr::row_layout_on(vocabulary, static_cast<rlvr::DType>(dtype), second_sweep, device,
                                                    smallest_cluster);
    return py::make_tuple(layout.cluster, layout.threads, layout.shared_bytes);
}

}  // namespace

PYBIND11_MODULE(_cuda_rows, module) {
    module.doc() = "CUDA row pass. Arguments are addresses on the device, validated by the caller.";
    module.def("row_pass", &row_pass, py::arg("logits_dtype"), py::arg("logits"), py::arg("logits_stride"),
               py::arg("tokens"), py::arg("block_dtype"), py::arg("block"), py::arg("block_stride"), py::arg("rows"),
               py::arg("vocabulary"), py::arg("inverse_temperature"), py::arg("softcap"), py::arg("results"),
               py::arg("device"), py::arg("stream"), py::arg("smallest_cluster") = 1);
    module.def("row_layout", &row_layout, py::arg("dtype"), py::arg("vocabulary"), py::arg("second_sweep"),
               py::arg("device"), py::arg("smallest_cluster") = 1,
               "(thread blocks per row, threads per block, bytes of shared memory per block) on a device.");
}

// The Python module fmkernels._lab: facts about the build and the processor, and what the other
// files here bind.
#include "lab/lab.h"

#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

namespace fmk::lab {
namespace {

// A function-local static: the files' registrations run in no particular order.
std::vector<void (*)(py::module_&)>& all_bindings() {
  static std::vector<void (*)(py::module_&)> bindings;
  return bindings;
}

py::dict build_info() {
  py::list compiled, available;
  for (Isa isa : compiled_isas()) {
    compiled.append(isa_name(isa));
    if (isa_supported(isa)) available.append(isa_name(isa));
  }
  py::dict info;
  info["compiler"] = FMK_BUILD_COMPILER;
  info["torch"] = FMK_BUILD_TORCH;
  info["isas"] = compiled;
  info["isas_supported"] = available;
  return info;
}

}  // namespace

Bindings::Bindings(void (*bind)(py::module_&)) { all_bindings().push_back(bind); }

}  // namespace fmk::lab

PYBIND11_MODULE(_lab, module) {
  module.doc() = "fmkernels without torch: build facts, and the kernels one by one for tests";
  module.def("build_info", &fmk::lab::build_info,
             "compiler, torch (compiled against), isas, isas_supported (compiled, and run here)");
  module.def(
      "active_isa", [] { return fmk::isa_name(fmk::active_isa()); },
      "Name of the ISA in use. RuntimeError when FMKERNELS_ISA names one that cannot run.");
  for (auto bind : fmk::lab::all_bindings()) bind(module);
}

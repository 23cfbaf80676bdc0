// The bindings of steps, part of the extension module (bindings.cpp).
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace miras {

void bind_steps(pybind11::module_& m);

}  // namespace miras

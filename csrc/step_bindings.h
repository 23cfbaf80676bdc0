// Parts of the extension module (bindings.cpp): decoding steps, states, and what measurements need.
#pragma once

#include <pybind11/pybind11.h>

namespace miras {

void bind_steps(pybind11::module_& m);
void bind_states(pybind11::module_& m);
void bind_measuring(pybind11::module_& m);

}  // namespace miras

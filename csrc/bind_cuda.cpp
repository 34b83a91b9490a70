// The only file of the CUDA module that knows Python. Addresses come as integers, made by
// tensor.data_ptr(); shapes and dtypes were checked by fastfi/backends/cuda.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind_problems.h"
#include "cuda/launch.h"

#ifndef FASTFI_CUDA_TARGETS
#define FASTFI_CUDA_TARGETS ""
#endif

namespace py = pybind11;

namespace {

using fastfi::at;
using fastfi::with_objective;

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA error: ") + error);
}

class Solve {
 public:
  Solve(int rule, std::uintptr_t gram, std::uintptr_t log_prob, std::uintptr_t label,
        std::uintptr_t grad, std::uintptr_t tau, double tolerance, double row_tolerance, double eps,
        int64_t samples, int64_t blocks, int64_t n, int64_t classes, std::uintptr_t fi,
        std::uintptr_t rank)
      : p_(with_objective<fastfi::SolveProblem>(rule, log_prob, label, grad, tau, tolerance,
                                                row_tolerance, eps, classes, fi, rank)) {
    p_.gram = at<const double>(gram);
    p_.samples = samples;
    p_.blocks = blocks;
    p_.n = n;
  }
  int64_t workspace() const { return fastfi::gpu::solve_workspace(p_); }
  void run(int device, std::uintptr_t stream, std::uintptr_t workspace) const {
    check(fastfi::gpu::run_solve(p_, {device, at<void>(stream), at<double>(workspace)}));
  }

 private:
  fastfi::SolveProblem p_;
};

class Windows {
 public:
  Windows(int rule, std::uintptr_t rows, bool is_double, const std::vector<int64_t>& shape,
          int64_t classes, bool joint, std::vector<int64_t> radius, std::vector<int64_t> slot,
          std::uintptr_t log_prob, std::uintptr_t label, std::uintptr_t grad, std::uintptr_t tau,
          double tolerance, double row_tolerance, double eps, std::uintptr_t fi,
          std::uintptr_t rank)
      : radius_(std::move(radius)),
        slot_(std::move(slot)),
        p_(with_objective<fastfi::WindowProblem>(rule, log_prob, label, grad, tau, tolerance,
                                                 row_tolerance, eps, classes, fi, rank)) {
    p_.rows = at<const void>(rows);
    p_.is_double = is_double;
    p_.samples = shape.at(0);
    p_.n = shape.at(1);
    p_.channels = shape.at(2);
    p_.depth = shape.at(3);
    p_.height = shape.at(4);
    p_.width = shape.at(5);
    p_.joint = joint;
    p_.scales = static_cast<int64_t>(radius_.size());
    p_.radius = radius_.data();
    p_.slot = slot_.data();
  }
  Windows(const Windows&) = delete;
  Windows& operator=(const Windows&) = delete;

  int64_t workspace() const { return fastfi::gpu::window_workspace(p_); }
  void run(int device, std::uintptr_t stream, std::uintptr_t workspace) const {
    check(fastfi::gpu::run_windows(p_, {device, at<void>(stream), at<double>(workspace)}));
  }

 private:
  std::vector<int64_t> radius_, slot_;
  fastfi::WindowProblem p_;
};

// "sm_80 sm_90 compute_90", as the build was told.
py::list targets() { return py::list(py::str(FASTFI_CUDA_TARGETS).attr("split")()); }

using Address = std::uintptr_t;

}  // namespace

#ifdef FASTFI_EMULATED
PYBIND11_MODULE(_emulated, m) {
  m.def("last_device", [] { return emulation::machine.last_launch_device; });
  m.def("set_device", [](int device) { return cudaSetDevice(device) == cudaSuccess; });
  m.def("device", [] { return emulation::machine.device; });
#else
PYBIND11_MODULE(_CUDA, m) {
#endif
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Solve>(m, "Solve")
      .def(py::init<int, Address, Address, Address, Address, Address, double, double, double,
                    int64_t, int64_t, int64_t, int64_t, Address, Address>())
      .def("workspace", &Solve::workspace, "Doubles of device memory that run() works in.")
      .def("run", &Solve::run, release());
  py::class_<Windows>(m, "Windows")
      .def(py::init<int, Address, bool, const std::vector<int64_t>&, int64_t, bool,
                    std::vector<int64_t>, std::vector<int64_t>, Address, Address, Address, Address,
                    double, double, double, Address, Address>())
      .def("workspace", &Windows::workspace, "Doubles of device memory that run() works in.")
      .def("run", &Windows::run, release());
  m.def("targets", &targets, "What the kernels were compiled for.");
}

// The only file of the CPU module that knows Python. Addresses come as integers, made by
// tensor.data_ptr(); shapes and dtypes were checked by fastfi/backends/cpu.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_problems.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

using fastfi::at;
using fastfi::KernelTable;
using fastfi::with_objective;

const KernelTable& table_named(const std::string& name) {
  for (const KernelTable* const* t = fastfi::runnable_tables(); *t; ++t)
    if (name.empty() || name == (*t)->name) return **t;
  throw std::invalid_argument("instruction set '" + name + "' is not available on this CPU");
}

void gram(std::uintptr_t rows, bool is_double, int64_t batch, int64_t count, int64_t columns,
          std::uintptr_t out, std::uintptr_t offsets, int64_t segments, int64_t offset_stride,
          int threads, const std::string& isa) {
  const KernelTable& table = table_named(isa);
  fastfi::run_gram(table,
                   {at<const void>(rows), is_double, batch, count, columns, at<double>(out),
                    at<const int64_t>(offsets), segments, offset_stride},
                   threads);
}

void solve(int rule, std::uintptr_t gram, std::uintptr_t log_prob, std::uintptr_t label,
           std::uintptr_t grad, std::uintptr_t tau, double tolerance, double row_tolerance,
           double eps, int64_t samples, int64_t blocks, int64_t n, int64_t classes,
           std::uintptr_t fi, std::uintptr_t rank, int threads, const std::string& isa) {
  const KernelTable& table = table_named(isa);
  auto p = with_objective<fastfi::SolveProblem>(rule, log_prob, label, grad, tau, tolerance,
                                                row_tolerance, eps, classes, fi, rank);
  p.gram = at<const double>(gram);
  p.samples = samples;
  p.blocks = blocks;
  p.n = n;
  fastfi::run_solve(table, p, threads);
}

void windows(int rule, std::uintptr_t rows, bool is_double, const std::vector<int64_t>& shape,
             int64_t classes, bool joint, const std::vector<int64_t>& radius,
             const std::vector<int64_t>& slot, std::uintptr_t log_prob, std::uintptr_t label,
             std::uintptr_t grad, std::uintptr_t tau, double tolerance, double row_tolerance,
             double eps, std::uintptr_t fi, std::uintptr_t rank, int threads,
             const std::string& isa) {
  const KernelTable& table = table_named(isa);
  auto p = with_objective<fastfi::WindowProblem>(rule, log_prob, label, grad, tau, tolerance,
                                                 row_tolerance, eps, classes, fi, rank);
  p.rows = at<const void>(rows);
  p.is_double = is_double;
  p.samples = shape.at(0);
  p.n = shape.at(1);
  p.channels = shape.at(2);
  p.depth = shape.at(3);
  p.height = shape.at(4);
  p.width = shape.at(5);
  p.joint = joint;
  p.scales = static_cast<int64_t>(radius.size());
  p.radius = radius.data();
  p.slot = slot.data();
  fastfi::run_windows(table, p, threads);
}

void ghost(std::uintptr_t x, bool x_double, const std::vector<int64_t>& x_shape,
           const std::vector<int64_t>& x_stride, std::uintptr_t patches, int64_t positions,
           int64_t taps, const std::vector<std::uintptr_t>& d, bool d_double, int64_t outputs,
           const std::vector<int64_t>& d_stride, std::uintptr_t out, int threads,
           const std::string& isa) {
  const KernelTable& table = table_named(isa);
  std::vector<const void*> rows;
  for (const std::uintptr_t address : d) rows.push_back(at<const void>(address));
  fastfi::GhostProblem p;
  p.x = at<const void>(x);
  p.x_double = x_double;
  p.d_double = d_double;
  p.batch = x_shape.at(0);
  p.groups = x_shape.at(1);
  p.channels = x_shape.at(2);
  p.pixels = x_shape.at(3);
  p.x_sample = x_stride.at(0);
  p.x_channel = x_stride.at(1);
  p.x_pixel = x_stride.at(2);
  p.at = at<const int32_t>(patches);
  p.positions = positions;
  p.taps = taps;
  p.d = rows.data();
  p.rows = static_cast<int64_t>(rows.size());
  p.outputs = outputs;
  p.d_sample = d_stride.at(0);
  p.d_output = d_stride.at(1);
  p.d_position = d_stride.at(2);
  p.out = at<double>(out);
  fastfi::run_ghost(table, p, threads);
}

void channel_sums(const std::vector<std::uintptr_t>& d, const std::vector<std::uintptr_t>& factor,
                  const std::vector<int64_t>& channels, const std::vector<int64_t>& positions,
                  bool is_double, int64_t batch, std::uintptr_t out, int threads,
                  const std::string& isa) {
  std::vector<fastfi::SumsItem> items;
  int64_t columns = 0;
  for (std::size_t i = 0; i < d.size(); ++i) {
    items.push_back({at<const void>(d.at(i)), at<const void>(factor.at(i)), channels.at(i),
                     positions.at(i), columns});
    columns += 2 * channels.at(i);
  }
  fastfi::run_sums(
      table_named(isa),
      {items.data(), static_cast<int64_t>(items.size()), batch, is_double, at<void>(out), columns},
      threads);
}

py::list instruction_sets() {
  py::list names;
  for (const KernelTable* const* t = fastfi::runnable_tables(); *t; ++t) names.append((*t)->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("gram", &gram, release());
  m.def("solve", &solve, release());
  m.def("windows", &windows, release());
  m.def("ghost", &ghost, release());
  m.def("channel_sums", &channel_sums, release());
  m.def("instruction_sets", &instruction_sets, "Runnable on this CPU, the one in use first.");
}

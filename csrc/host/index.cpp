// _host: which thread of a CUDA kernel works on which elements (cuda/index.h), by running all
// threads of a launch on the host.
#include "cuda/index.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

namespace py = pybind11;

namespace coup_fast {
namespace {

using Rows = std::vector<std::vector<int64_t>>;

// [thread, sample, first, count, channel, pixel] of every quad that a grid of `threads` threads
// visits, thread by thread, as cuda/per_quad.cuh does.
Rows grid_places(int64_t threads, int64_t batch, int64_t channels, int64_t pixels,
                 bool channels_last) {
  View state;
  state.channel_stride = channels_last ? 1 : pixels;
  state.pixel_stride = channels_last ? channels : 1;
  const cuda::Order order = cuda::order_of(state, channels, pixels);
  const cuda::Stride stride = cuda::stride_of(threads, channels * pixels);
  Rows rows;
  for (int64_t thread = 0; thread < threads; ++thread) {
    cuda::Cursor cursor = cuda::cursor_at(static_cast<unsigned>(thread), stride);
    for (; cursor.sample < batch; cuda::advance(cursor, stride)) {
      cuda::Place place = cuda::place_of(cursor.sample, cursor.quad, order);
      cuda::locate(place, order.pixels);
      rows.push_back({thread, place.sample, place.first, place.count, place.channel, place.pixel});
    }
  }
  return rows;
}

// [block, turn, group, segment, step, thread, first, count, slot] of every quad that the blocks of
// a sample sum, as cuda/per_sample.cuh does.
Rows sum_places(int64_t numel, int blocks, int groups) {
  const int segments = static_cast<int>(num_segments(numel));
  const int size = static_cast<int>(numel);
  const int slots = blocks * groups;
  Rows rows;
  for (int segment = 0; segment < segments; ++segment) {
    const int turn = segment / slots;
    const int block = segment % slots / groups;
    const int group = segment % groups;
    for (int thread = 0; thread < cuda::kSumThreads; ++thread) {
      const int steps = cuda::sum_steps(size, segment, thread);
      for (int step = 0; step < steps; ++step) {
        const int first = cuda::sum_first(segment, step, thread);
        const cuda::Place place = cuda::place_at(0, first, size);
        rows.push_back({block, turn, group, segment, step, thread, place.first, place.count,
                        cuda::sum_first(group, step, thread)});
      }
    }
  }
  return rows;
}

std::tuple<int, int> team_of(int64_t segments, int most_groups, bool has_clusters) {
  const cuda::Team team = cuda::team_of(segments, most_groups, has_clusters);
  return {team.blocks, team.groups};
}

}  // namespace

void bind_index(py::module_& m) {
  m.def("grid_places", &grid_places, py::arg("threads"), py::arg("batch"), py::arg("channels"),
        py::arg("pixels"), py::arg("channels_last"));
  m.def("sum_places", &sum_places, py::arg("numel"), py::arg("blocks"), py::arg("groups"));
  m.def("team_of", &team_of, py::arg("segments"), py::arg("most_groups"), py::arg("has_clusters"));
  m.attr("max_cluster") = cuda::kMaxCluster;
  m.attr("max_segments") = cuda::kMaxSegments;
  m.attr("max_own") = cuda::kMaxOwn;
  m.attr("sum_threads") = cuda::kSumThreads;
  m.attr("sum_steps") = cuda::kSumSteps;
}

}  // namespace coup_fast

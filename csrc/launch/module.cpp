// The Python module stella_kernels._launcher: operators that launch plans, or say that they have none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "launch/base_product.h"
#include "launch/plans.h"

namespace py = pybind11;

namespace {

using namespace stella::launch;

constexpr size_t kMostOperators = 4;
std::array<Operator, kMostOperators> g_operators;
size_t g_count = 0;
TorchLibraryHandle g_library;  // for as long as the process runs

// What Python is asked at every call, under its lock.
struct Runtime {
  PyObject *knobs, *deterministic, *autocast, *autocast_dtype, *device, *stream;
};
Runtime g_runtime;

// Of this thread: the operator whose last call had no plan, and the kind of that call, until a plan is made of it.
struct Missed {
  Operator* op = nullptr;
  Key key;
};
thread_local Missed t_missed;
thread_local bool t_recording = false;  // a plan is being made: launches go through Python, which notes them

struct Lock {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Lock() { PyGILState_Release(state); }
};

py::object result_of(PyObject* found) {
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

bool is_true(const py::object& value) { return PyObject_IsTrue(value.ptr()) != 0; }

bool has_calls(PyObject* hook) {
  static PyObject* const calls = PyUnicode_InternFromString("calls");
  const py::object chain = result_of(PyObject_GetAttr(g_runtime.knobs, hook));
  return is_true(result_of(PyObject_GetAttr(chain.ptr(), calls)));
}

// Whether plans serve now; the last word of the key, and the stream, are Python's to tell.
bool ask(const Operator& op, Call& call, void*& stream) {
  const Lock lock;
  try {
    static PyObject* const enter = PyUnicode_InternFromString("launch_enter_hook");
    static PyObject* const exit = PyUnicode_InternFromString("launch_exit_hook");
    if (has_calls(enter) || has_calls(exit)) return false;
    if (call.device >= 0 && result_of(PyObject_CallNoArgs(g_runtime.device)).cast<int>() != call.device) return false;
    call.key.push_back(is_true(result_of(PyObject_CallNoArgs(g_runtime.deterministic))));
    if (op.follows_autocast && is_true(result_of(PyObject_CallNoArgs(g_runtime.autocast))))  // a dtype is one object
      call.key.push_back(reinterpret_cast<int64_t>(result_of(PyObject_CallNoArgs(g_runtime.autocast_dtype)).ptr()));
    const py::int_ index(call.device < 0 ? 0 : call.device);
    stream = PyLong_AsVoidPtr(result_of(PyObject_CallOneArg(g_runtime.stream, index.ptr())).ptr());
    return true;
  } catch (py::error_already_set&) {  // the way through Python says what is wrong
    return false;
  }
}

using Tensors = std::vector<torch::stable::Tensor>;

// The plan of this kind of call, or none, which is remembered.
std::shared_ptr<const Plan> planned(Operator& op, const StableIValue* stack, Call& call, void*& stream) {
  t_missed.op = nullptr;
  if (t_recording) return nullptr;
  call.key.reserve(96);
  read(op, stack, call);
  if (!ask(op, call, stream)) return nullptr;
  auto plan = find(op, call);
  if (!plan) t_missed = {&op, std::move(call.key)};
  return plan && has_context() ? plan : nullptr;
}

Tensors launched(Operator& op, const StableIValue* stack) {
  Call call;
  void* stream = nullptr;
  const auto plan = planned(op, stack, call, stream);
  return plan ? replay(*plan, call, stream) : Tensors{};
}

// linear(x, W, b, U, S, Vt, scale, p): y with the adapter in it, A, and the seed where p is not 0. To a plan of
// adapter_forward_, y and the seed are the tensors after the call's own.
Tensors linear(Operator& op, const StableIValue* stack) {
  Call call;
  void* stream = nullptr;
  const auto plan = planned(op, stack, call, stream);
  if (!plan || !call.flat) return {};
  Tensors results = {linear_product(stack)};
  if (!expects(*plan, results[0])) return {};
  call.addresses[call.tensors++] = address_of(results[0]);
  if (torch::stable::detail::to<double>(stack[7]) > 0.0) {
    results.push_back(drawn_seed(call));
    call.addresses[call.tensors++] = address_of(results[1]);
  }
  Tensors made = replay(*plan, call, stream);
  results.insert(results.begin() + 1, made[0]);
  return results;
}

// linear_backward(grad_y, x, W, A, U, S, Vt, scale, p, seed, need_x, needed): the gradients of x, of no size where it
// needs none, and of the factors. To a plan of adapter_backward_, grad_x is the tensor after the call's own.
Tensors linear_backward(Operator& op, const StableIValue* stack) {
  Call call;
  void* stream = nullptr;
  const auto plan = planned(op, stack, call, stream);
  if (!plan || !call.flat) return {};
  Tensors results;
  if (torch::stable::detail::to<bool>(stack[10])) {
    results.push_back(product(stack[0], stack[2]));
    if (!expects(*plan, results[0])) return {};
    call.addresses[call.tensors++] = address_of(results[0]);
  }
  Tensors made = replay(*plan, call, stream);
  results.insert(results.end(), made.begin(), made.end());
  return results;
}

using Body = Tensors (*)(Operator&, const StableIValue*);
std::array<Body, kMostOperators> g_bodies;

template <size_t which>
void serve(StableIValue* stack, uint64_t, uint64_t) {
  Operator& op = g_operators[which];
  Tensors results;
  try {
    results = g_bodies[which](op, stack);
  } catch (const LaunchFailure&) {
    drop(op, stack);
    throw;
  } catch (const std::exception&) {  // no memory, for example: the way through Python says so as torch does
    results.clear();
  }
  drop(op, stack);
  stack[0] = torch::stable::detail::from(results);
}

// number(tensors): see plans.h; 0 of tensors that have no address.
void serve_number(StableIValue* stack, uint64_t, uint64_t) {
  const auto list = reinterpret_cast<StableListHandle>(stack[0]);
  int64_t number = 0;
  try {
    number = number_of(list);
  } catch (const std::exception&) {
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  stack[0] = torch::stable::detail::from(number);
}

template <size_t... which>
constexpr auto all_of(std::index_sequence<which...>) {
  return std::array<void (*)(StableIValue*, uint64_t, uint64_t), sizeof...(which)>{&serve<which>...};
}
constexpr auto kServe = all_of(std::make_index_sequence<kMostOperators>());

bool enable(const std::string& space, const std::string& key,
            const std::vector<std::pair<std::string, std::string>>& operators, py::object knobs,
            py::object deterministic, py::object autocast, py::object autocast_dtype, py::object device,
            py::object stream) {
  if (g_count || operators.size() > kMostOperators || !has_driver()) return false;
  g_runtime = {knobs.release().ptr(),          deterministic.release().ptr(), autocast.release().ptr(),
               autocast_dtype.release().ptr(), device.release().ptr(),        stream.release().ptr()};
  TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl(space.c_str(), key.c_str(), __FILE__, __LINE__, &g_library));
  for (const auto& [name, kinds] : operators) {
    Operator& op = g_operators[g_count];
    op.follows_autocast = name.rfind("linear", 0) == 0;
    op.name = name, op.kinds = kinds;
    g_bodies[g_count] = name == "linear" ? linear : name == "linear_backward" ? linear_backward : launched;
    TORCH_ERROR_CODE_CHECK(torch_library_impl(g_library, op.name.c_str(), kServe[g_count++], TORCH_ABI_VERSION));
  }
  TORCH_ERROR_CODE_CHECK(torch_library_impl(g_library, "number", serve_number, TORCH_ABI_VERSION));
  return true;
}

int32_t dtype_by(const std::string& name) {
  if (name == "torch.float32") return aoti_torch_dtype_float32();
  if (name == "torch.float64") return aoti_torch_dtype_float64();
  if (name == "torch.bfloat16") return aoti_torch_dtype_bfloat16();
  if (name == "torch.float16") return aoti_torch_dtype_float16();
  throw py::value_error("results: found " + name + ", wanted a dtype of the kernels.");
}

using PlaceTuple = std::tuple<int, int, int64_t>;
using LaunchTuple =
    std::tuple<uint64_t, std::vector<unsigned>, unsigned, unsigned, std::vector<py::bytes>, std::vector<PlaceTuple>>;
using ResultTuple = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::string>;

bool keep(const std::string& name, const std::vector<LaunchTuple>& launches, const std::vector<ResultTuple>& results,
          int64_t scratch, const std::vector<int64_t>& extents, const std::string& accumulated) {
  Missed missed = std::exchange(t_missed, {});
  if (!missed.op || missed.op->name != name || results.size() > kMostResults) return false;
  auto plan = std::make_shared<Plan>();
  for (const auto& [function, grid, threads, shared_bytes, values, places] : launches) {
    if (values.size() > kMostParameters) return false;
    Launch step = {
        reinterpret_cast<void*>(function), {grid.at(0), grid.at(1), grid.at(2)}, threads, shared_bytes, {}, {}};
    for (const auto& value : values) {
      uint64_t word = 0;
      const std::string bytes = value;
      std::memcpy(&word, bytes.data(), std::min(bytes.size(), sizeof word));
      step.values.push_back(word);
    }
    for (const auto& [parameter, source, which] : places) step.places.push_back({parameter, source, which});
    plan->launches.push_back(std::move(step));
  }
  for (const auto& [sizes, strides, dtype] : results) plan->results.push_back({sizes, strides, dtype_by(dtype)});
  plan->scratch = scratch;
  plan->extents = extents;
  plan->accumulated = accumulated.empty() ? -1 : dtype_by(accumulated);
  const std::unique_lock lock(missed.op->mutex);
  if (missed.op->plans.size() >= kMostPlans) missed.op->plans.clear();
  missed.op->plans[std::move(missed.key)] = std::move(plan);
  return true;
}

}  // namespace

PYBIND11_MODULE(_launcher, m) {
  m.doc() = "Launch plans of stella_kernels' layer operators, launched without Python.";
  m.def("enable", &enable, py::arg("space"), py::arg("key"), py::arg("operators"), py::arg("knobs"),
        py::arg("deterministic"), py::arg("autocast"), py::arg("autocast_dtype"), py::arg("device"), py::arg("stream"),
        "Implement operators of a namespace under a dispatch key: each returns its results, or none where it has no "
        "plan. False where there is no driver.");
  m.def("keep", &keep, py::arg("operator"), py::arg("launches"), py::arg("results"), py::arg("scratch"),
        py::arg("extents"), py::arg("accumulated") = "",
        "Keep a plan for the kind of this thread's last call, which had none.");
  m.def(
      "missed", [](const std::string& name) { return t_missed.op && t_missed.op->name == name; }, py::arg("operator"),
      "Whether this thread's last call was of that operator and had no plan.");
  m.def("recording", [](bool on) { t_recording = on; }, py::arg("on"), "Whether this thread is making a plan.");
  m.def(
      "forget",
      [] {
        for (Operator& op : g_operators) {
          const std::unique_lock lock(op.mutex);
          op.plans.clear();
        }
      },
      "Drop all plans.");
  m.def(
      "plans",
      [](const std::string& name) {
        for (Operator& op : g_operators)
          if (op.name == name) return op.plans.size();
        throw py::key_error(name);
      },
      py::arg("operator"), "How many there are.");
}

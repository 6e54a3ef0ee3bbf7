// SPDX-License-Identifier: Apache-2.0
// Python module `_direct`: plain dense calls on ordinary tensors, past torch's dispatcher, which
// takes longer for such a call than everything else the host does. Tensors are read through
// DLPack's C exchange functions. Every function returns None where the call is anything but plain
// or fails; then the operators run it and raise its errors. Built for the stable ABI of Python
// >= 3.10.
#define Py_LIMITED_API 0x030A0000
#include <ATen/dlpack.h>
#include <Python.h>

#include <algorithm>
#include <utility>

#include "../torch/direct.h"

namespace {

using sinkattn::Device;
using sinkattn::DeviceType;
using sinkattn::DType;
using sinkattn::TensorView;
using sinkattn::torch_binding::DirectBackward;
using sinkattn::torch_binding::DirectForward;
using sinkattn::torch_binding::DirectOptions;
using sinkattn::torch_binding::DirectTable;

/// A Python function without arguments, and where it is a plain C function, that.
struct Question {
  PyObject* callable;
  PyCFunction function;
  PyObject* self;

  PyObject* ask() const {
    return function != nullptr ? function(self, nullptr) : PyObject_CallNoArgs(callable);
  }
};

constexpr int max_questions = 8;

/// What setup() and connect() were given; the references are never dropped.
struct {
  const DirectTable* native = nullptr;
  const DLPackExchangeAPI* dlpack = nullptr;
  PyObject* tensor = nullptr;     ///< torch.Tensor
  PyObject* parameter = nullptr;  ///< torch.nn.Parameter
  /// (size, stride, dtype) -> tensor on the CPU and on the current CUDA device.
  PyObject *empty_cpu = nullptr, *empty_cuda = nullptr;
  PyObject* dtypes = nullptr;    ///< torch's dtypes, by the core's numbers
  PyObject* profiler = nullptr;  ///< namespace of torch.autograd.profiler
  Question questions[max_questions] = {};
  int question_count = 0;
  PyObject* apply = nullptr;  ///< of the autograd functions without and with an LSE
  PyObject* apply_lse = nullptr;
  long pauses = 0;  ///< > 0: every call is somebody else's
  PyObject *zero = nullptr, *one = nullptr;
  /// The getter of Tensor.requires_grad: an attribute lookup takes three times as long.
  PyObject* requires_grad = nullptr;
  descrgetfunc get_requires_grad = nullptr;
  PyObject *profiling = nullptr, *to_save = nullptr, *options = nullptr,
           *materialize_grads = nullptr;
} state;

/// A reference that is dropped unless somebody takes it.
class Owned {
 public:
  explicit Owned(PyObject* object = nullptr) : object_(object) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }

  explicit operator bool() const { return object_ != nullptr; }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  void reset(PyObject* object) { Py_XDECREF(std::exchange(object_, object)); }

 private:
  PyObject* object_;
};

PyObject* none() { return Py_NewRef(Py_None); }

PyObject* not_taken() {
  PyErr_Clear();
  return none();
}

bool is_exactly(PyObject* object, PyObject* type) {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type;
}

bool is_tensor(PyObject* object) { return is_exactly(object, state.tensor); }

/// A sink is mostly a parameter.
bool is_sink(PyObject* object) {
  return object == Py_None || is_tensor(object) || is_exactly(object, state.parameter);
}

bool is_bool(PyObject* object) { return object == Py_True || object == Py_False; }

/// Whether nothing that watches or changes operators is active in this thread: modes, transforms,
/// tracers, profilers. They must see the operator.
bool unobserved() {
  if (PyDict_GetItemWithError(state.profiler, state.profiling) != Py_False) return false;
  for (int i = 0; i < state.question_count; ++i) {
    PyObject* answer = state.questions[i].ask();
    if (answer == nullptr) return false;
    const bool no = answer == Py_False || answer == state.zero;
    Py_DECREF(answer);
    if (!no) return false;
  }
  return true;
}

DType dtype_of(DLDataType type) {
  if (type.lanes != 1) return DType::undefined;
  if (type.code == kDLBfloat && type.bits == 16) return DType::bfloat16;
  if (type.code == kDLFloat8_e4m3fn && type.bits == 8) return DType::float8_e4m3;
  if (type.code != kDLFloat) return DType::undefined;
  if (type.bits == 16) return DType::float16;
  if (type.bits == 32) return DType::float32;
  return type.bits == 64 ? DType::float64 : DType::undefined;
}

/// The view of a floating-point tensor in ordinary memory; false for any other.
bool read(PyObject* tensor, TensorView* view) {
  DLTensor raw;
  if (state.dlpack->dltensor_from_py_object_no_sync(tensor, &raw) != 0) return false;
  view->dtype = dtype_of(raw.dtype);
  const bool cuda = raw.device.device_type == kDLCUDA;
  if (view->dtype == DType::undefined || (!cuda && raw.device.device_type != kDLCPU) ||
      raw.ndim > TensorView::max_rank) {
    return false;
  }
  view->device = cuda ? Device{DeviceType::cuda, raw.device.device_id} : Device{};
  view->rank = raw.ndim;
  for (int i = 0; i < raw.ndim; ++i) {
    view->shape[i] = raw.shape[i];
    view->stride[i] = raw.strides[i];
  }
  // Zero tensors and what functionalisation wraps have a shape but no memory.
  if (raw.data == nullptr) return view->numel() == 0;
  view->data = static_cast<char*>(raw.data) + raw.byte_offset;
  return true;
}

/// As read(). A real view of a conjugated complex tensor, whose values are negated when they are
/// read, has strides that only a sink may have: such a sink is refused by its stride.
bool read_sink(PyObject* sink, TensorView* view) {
  if (sink == Py_None) return true;
  return read(sink, view) && view->rank == 1 && (view->stride[0] == 1 || view->shape[0] <= 1);
}

bool read_integer(PyObject* object, std::int64_t* value) {
  if (!is_exactly(object, reinterpret_cast<PyObject*>(&PyLong_Type))) return false;
  *value = PyLong_AsLongLong(object);
  return *value != -1 || PyErr_Occurred() == nullptr;
}

/// The five options of a plain call, which Python hands around as one tuple.
bool read_options(PyObject* scale, PyObject* causal, PyObject* left, PyObject* right,
                  PyObject* deterministic, DirectOptions* options) {
  if (!is_bool(causal) || !is_bool(deterministic)) return false;
  if (scale != Py_None) {
    if (!is_exactly(scale, reinterpret_cast<PyObject*>(&PyFloat_Type))) return false;
    options->softmax_scale = PyFloat_AsDouble(scale);
  }
  options->causal = causal == Py_True;
  options->deterministic = deterministic == Py_True;
  return read_integer(left, &options->window_left) && read_integer(right, &options->window_right);
}

bool read_options(PyObject* tuple, DirectOptions* options) {
  if (!PyTuple_CheckExact(tuple) || PyTuple_Size(tuple) != 5) return false;
  return read_options(PyTuple_GetItem(tuple, 0), PyTuple_GetItem(tuple, 1),
                      PyTuple_GetItem(tuple, 2), PyTuple_GetItem(tuple, 3),
                      PyTuple_GetItem(tuple, 4), options);
}

/// Arguments (size, stride, dtype) of an allocation.
PyObject* allocation_of(const TensorView& view) {
  Owned size(PyTuple_New(view.rank));
  Owned stride(PyTuple_New(view.rank));
  if (!size || !stride) return nullptr;
  std::int64_t step = 1;
  for (int i = view.rank; i-- > 0;) {
    PyObject* n = PyLong_FromLongLong(view.shape[i]);
    PyObject* s = PyLong_FromLongLong(step);
    if (n == nullptr || s == nullptr) return nullptr;
    PyTuple_SetItem(size.get(), i, n);
    PyTuple_SetItem(stride.get(), i, s);
    step *= std::max<std::int64_t>(view.shape[i], 1);
  }
  PyObject* dtype = PyTuple_GetItem(state.dtypes, static_cast<int>(view.dtype));
  return PyTuple_Pack(3, size.get(), stride.get(), dtype);
}

/// allocation_of(view), remembered: a model allocates the same few shapes over and over, and Python
/// numbers cost more than finding them again. The caller does not own the result.
PyObject* known_allocation_of(const TensorView& view) {
  struct Known {
    TensorView view;
    PyObject* arguments = nullptr;
  };
  constexpr int slots = 16;
  static Known known[slots];
  std::uint64_t hash = static_cast<std::uint64_t>(view.dtype) + view.rank;
  for (int i = 0; i < view.rank; ++i) {
    hash = (hash ^ static_cast<std::uint64_t>(view.shape[i])) * 0x9E3779B97F4A7C15;
  }
  Known& entry = known[hash >> 60];
  if (entry.arguments == nullptr || entry.view.dtype != view.dtype ||
      entry.view.rank != view.rank ||
      !std::equal(view.shape, view.shape + view.rank, entry.view.shape)) {
    PyObject* arguments = allocation_of(view);
    if (arguments == nullptr) return nullptr;
    entry.view = view;
    Py_XDECREF(std::exchange(entry.arguments, arguments));
  }
  return entry.arguments;
}

/// A new contiguous tensor of the shape, dtype and device of `view`, which learns its address.
/// torch.empty goes through the dispatcher and takes two to three times as long.
PyObject* allocate(TensorView* view) {
  const bool cuda = view->device.type == DeviceType::cuda;
  PyObject* arguments = known_allocation_of(*view);
  if (arguments == nullptr) return nullptr;
  Py_INCREF(arguments);  // another thread may take its slot meanwhile
  Owned tensor(PyObject_Call(cuda ? state.empty_cuda : state.empty_cpu, arguments, nullptr));
  Py_DECREF(arguments);
  if (!tensor || !read(tensor.get(), view)) return nullptr;
  return tensor.release();
}

/// A call without the GIL, which comes back for it where a workspace is needed. The workspace lives
/// until the launch; torch's allocator keeps it for what runs on the same stream.
struct Unlocked {
  Device device;
  PyThreadState* thread = nullptr;
  Owned workspace{};

  static void* allocate(void* self, std::int64_t bytes) {
    auto* const unlocked = static_cast<Unlocked*>(self);
    PyEval_RestoreThread(unlocked->thread);
    TensorView view;
    view.device = unlocked->device;
    view.dtype = DType::float32;
    view.rank = 1;
    view.shape[0] = (bytes + 3) / 4;
    unlocked->workspace.reset(::allocate(&view));
    unlocked->thread = PyEval_SaveThread();
    return view.data;
  }
};

template <class Call>
bool run(bool (*function)(const Call&) noexcept, Call& call) {
  Unlocked unlocked{call.query.device};
  // On the CPU the library allocates without the dispatcher and without the GIL.
  if (unlocked.device.type == DeviceType::cuda) call.workspace = {Unlocked::allocate, &unlocked};
  unlocked.thread = PyEval_SaveThread();
  const bool done = function(call);
  PyEval_RestoreThread(unlocked.thread);
  return done;
}

/// q, k, v and the sink. Where this and the next return false, an error may be set.
bool read_inputs(PyObject* const* inputs, DirectForward* call) {
  return read(inputs[0], &call->query) && read(inputs[1], &call->key) &&
         read(inputs[2], &call->value) && read_sink(inputs[3], &call->learnable_sink);
}

/// Allocates the outputs.
bool allocate_outputs(DirectForward* call, Owned* out, Owned* lse) {
  if (!state.native->is_current(call->query.device) || !state.native->forward_outputs(*call)) {
    return false;
  }
  out->reset(allocate(&call->out));
  if (!*out) return false;
  if (call->want_lse) {
    lse->reset(allocate(&call->softmax_lse));
    if (!*lse) return false;
  }
  return true;
}

/// 1 or 0: whether a gradient is wanted; -1 with an error set.
int wants_gradient(PyObject* const* tensors, int count) {
  if (!state.native->grad_enabled()) return 0;
  for (int i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) continue;
    PyObject* answer = state.get_requires_grad(state.requires_grad, tensors[i], state.tensor);
    if (answer == nullptr) return -1;
    Py_DECREF(answer);
    if (answer == Py_True) return 1;
  }
  return 0;
}

/// Arguments of flash_attn_func in its order.
enum Argument {
  arg_q,
  arg_k,
  arg_v,
  arg_softmax_scale,
  arg_causal,
  arg_qv,
  arg_q_descale,
  arg_k_descale,
  arg_v_descale,
  arg_window_size,
  arg_attention_chunk,
  arg_softcap,
  arg_num_splits,
  arg_pack_gqa,
  arg_deterministic,
  arg_sm_margin,
  arg_return_attn_probs,
  arg_s_aux,
  arg_sinks,
  arg_learnable_sink,
  argument_count,
};

/// Whether every option that a plain call has not is at its default. Integers are compared by
/// identity, which also rules out 0.0, False and tensors; an interpreter that shares no small
/// integers merely takes the general path.
bool is_plain(PyObject* const* a) {
  for (Argument none :
       {arg_qv, arg_q_descale, arg_k_descale, arg_v_descale, arg_pack_gqa, arg_s_aux, arg_sinks}) {
    if (a[none] != Py_None) return false;
  }
  return a[arg_attention_chunk] == state.zero && a[arg_num_splits] == state.one &&
         a[arg_sm_margin] == state.zero &&
         is_exactly(a[arg_softcap], reinterpret_cast<PyObject*>(&PyFloat_Type)) &&
         PyFloat_AsDouble(a[arg_softcap]) == 0.0 && PyTuple_CheckExact(a[arg_window_size]) &&
         PyTuple_Size(a[arg_window_size]) == 2 && is_bool(a[arg_return_attn_probs]) &&
         is_tensor(a[arg_q]) && is_tensor(a[arg_k]) && is_tensor(a[arg_v]) &&
         is_sink(a[arg_learnable_sink]);
}

/// The call through autograd: torch calls forward() or forward_lse() below.
PyObject* call_with_gradient(PyObject* const* a, PyObject* left, PyObject* right) {
  PyObject* options =
      PyTuple_Pack(5, a[arg_softmax_scale], a[arg_causal], left, right, a[arg_deterministic]);
  if (options == nullptr) return nullptr;
  PyObject* apply = a[arg_return_attn_probs] == Py_True ? state.apply_lse : state.apply;
  PyObject* result = PyObject_CallFunctionObjArgs(apply, a[arg_q], a[arg_k], a[arg_v],
                                                  a[arg_learnable_sink], options, nullptr);
  Py_DECREF(options);
  if (result == nullptr && PyErr_ExceptionMatches(PyExc_RuntimeError)) return not_taken();
  return result;
}

/// call(every argument of flash_attn_func, by position) -> its result, or None.
PyObject* call(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != argument_count || state.apply == nullptr || state.pauses > 0 || !is_plain(a)) {
    return none();
  }
  PyObject* left = PyTuple_GetItem(a[arg_window_size], 0);
  PyObject* right = PyTuple_GetItem(a[arg_window_size], 1);
  DirectForward c;
  if (!read_options(a[arg_softmax_scale], a[arg_causal], left, right, a[arg_deterministic],
                    &c.options) ||
      !unobserved()) {
    return not_taken();
  }
  PyObject* const tensors[] = {a[arg_q], a[arg_k], a[arg_v], a[arg_learnable_sink]};
  const int gradient = wants_gradient(tensors, 4);
  if (gradient < 0) return not_taken();
  if (gradient > 0) return call_with_gradient(a, left, right);
  c.want_lse = a[arg_return_attn_probs] == Py_True;
  Owned out, lse;
  if (!read_inputs(tensors, &c) || !allocate_outputs(&c, &out, &lse) ||
      !run(state.native->forward, c)) {
    return not_taken();
  }
  return c.want_lse ? PyTuple_Pack(2, out.get(), lse.get()) : out.release();
}

/// Leaves in an autograd context what FunctionCtx.save_for_backward() and set_materialize_grads()
/// would leave there.
bool fill_context(PyObject* context, PyObject* const* inputs, PyObject* out, PyObject* lse,
                  PyObject* options) {
  PyObject* saved = PyTuple_Pack(6, inputs[0], inputs[1], inputs[2], inputs[3], out, lse);
  if (saved == nullptr) return false;
  const bool done = PyObject_SetAttr(context, state.to_save, saved) == 0 &&
                    PyObject_SetAttr(context, state.options, options) == 0 &&
                    PyObject_SetAttr(context, state.materialize_grads, Py_False) == 0;
  Py_DECREF(saved);
  return done;
}

/// Forward of an autograd function: (context, q, k, v, sink, options) -> out, or (out, lse).
PyObject* autograd_forward(PyObject* const* a, Py_ssize_t count, bool return_lse) {
  DirectForward c;
  c.want_lse = true;  // the backward reads it
  Owned out, lse;
  if (count != 6 || !read_options(a[5], &c.options) || !read_inputs(a + 1, &c) ||
      c.query.dtype == DType::float8_e4m3 || !allocate_outputs(&c, &out, &lse) ||
      !fill_context(a[0], a + 1, out.get(), lse.get(), a[5]) ||
      !run(state.native->forward, c)) {  // last: what follows a launch meets cold caches
    PyErr_SetString(PyExc_RuntimeError, "sinkattn: the operators run this call");
    return nullptr;
  }
  return return_lse ? PyTuple_Pack(2, out.get(), lse.get()) : out.release();
}

PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  return autograd_forward(a, count, false);
}

PyObject* forward_lse(PyObject*, PyObject* const* a, Py_ssize_t count) {
  return autograd_forward(a, count, true);
}

bool read_optional(PyObject* tensor, TensorView* view) {
  return tensor == Py_None || (is_tensor(tensor) && read(tensor, view));
}

/// backward(dout, dlse, saved tensors, options, needs_input_grad) -> gradients of the five inputs
/// of forward(), or None.
PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  DirectBackward c;
  if (count != 5 || state.pauses > 0 || !PyTuple_CheckExact(a[2]) || PyTuple_Size(a[2]) != 6 ||
      !PyTuple_CheckExact(a[4]) || PyTuple_Size(a[4]) < 4 || (a[0] == Py_None && a[1] == Py_None)) {
    return none();
  }
  PyObject* saved[6];
  for (int i = 0; i < 6; ++i) {
    saved[i] = PyTuple_GetItem(a[2], i);
    if (i == 3 ? !is_sink(saved[i]) : !is_tensor(saved[i])) return none();
  }
  bool need[4];
  for (int i = 0; i < 4; ++i) need[i] = PyTuple_GetItem(a[4], i) == Py_True;
  if (!read_options(a[3], &c.options) || !unobserved() || !read_optional(a[0], &c.dout) ||
      !read_optional(a[1], &c.dlse) || !read(saved[0], &c.query) || !read(saved[1], &c.key) ||
      !read(saved[2], &c.value) || !read_sink(saved[3], &c.learnable_sink) ||
      !read(saved[4], &c.out) || !read(saved[5], &c.softmax_lse) ||
      !state.native->is_current(c.query.device)) {
    return not_taken();
  }
  // dk and dv come together.
  const bool compute[4] = {need[0], need[1] || need[2], need[1] || need[2], need[3]};
  const TensorView* const shapes[4] = {&c.query, &c.key, &c.value, &c.learnable_sink};
  TensorView* const views[4] = {&c.dq, &c.dk, &c.dv, &c.dsink};
  Owned gradients[4];
  for (int i = 0; i < 4; ++i) {
    if (!compute[i]) continue;
    *views[i] = *shapes[i];
    gradients[i].reset(allocate(views[i]));
    if (!gradients[i]) return not_taken();
  }
  if (!run(state.native->backward, c)) return not_taken();
  PyObject* results[4];
  for (int i = 0; i < 4; ++i) results[i] = need[i] ? gradients[i].get() : Py_None;
  return PyTuple_Pack(5, results[0], results[1], results[2], results[3], Py_None);
}
Question question_of(PyObject* callable) {
  Question question{Py_NewRef(callable), nullptr, nullptr};
  if (is_exactly(callable, reinterpret_cast<PyObject*>(&PyCFunction_Type)) &&
      (PyCFunction_GetFlags(callable) & ~METH_STATIC) == METH_NOARGS) {
    question.function = PyCFunction_GetFunction(callable);
    question.self = PyCFunction_GetSelf(callable);
  }
  return question;
}

/// setup(address of sinkattn_direct, exchange capsule, Tensor, Parameter, Tensor.requires_grad,
/// allocators for CPU and CUDA, dtypes, namespace of torch.autograd.profiler, questions)
PyObject* setup(PyObject*, PyObject* arguments) {
  unsigned long long address = 0;
  PyObject *capsule, *tensor, *parameter, *requires_grad, *cpu, *cuda, *dtypes, *profiler,
      *questions;
  if (!PyArg_ParseTuple(arguments, "KOOOOOOO!O!O!", &address, &capsule, &tensor, &parameter,
                        &requires_grad, &cpu, &cuda, &PyTuple_Type, &dtypes, &PyDict_Type,
                        &profiler, &PyTuple_Type, &questions)) {
    return nullptr;
  }
  const auto* dlpack =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (dlpack == nullptr) return nullptr;
  const DirectTable* native = reinterpret_cast<const DirectTable* (*)()>(address)();
  const Py_ssize_t count = PyTuple_Size(questions);
  const auto getter =
      reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(requires_grad), Py_tp_descr_get));
  if (native->layout != DirectTable{}.layout ||
      dlpack->header.version.major != DLPACK_MAJOR_VERSION ||
      dlpack->dltensor_from_py_object_no_sync == nullptr || count > max_questions ||
      getter == nullptr || PyTuple_Size(dtypes) <= static_cast<int>(DType::float16) ||
      PyDict_GetItemWithError(profiler, state.profiling) == nullptr) {
    PyErr_SetString(PyExc_ImportError,
                    "expected the operator library of this build, DLPack 1, a profiler");
    return nullptr;
  }
  state.native = native;
  state.dlpack = dlpack;
  state.tensor = Py_NewRef(tensor);
  state.parameter = Py_NewRef(parameter);
  state.requires_grad = Py_NewRef(requires_grad);
  state.get_requires_grad = getter;
  state.profiler = Py_NewRef(profiler);
  state.empty_cpu = Py_NewRef(cpu);
  state.empty_cuda = Py_NewRef(cuda);
  state.dtypes = Py_NewRef(dtypes);
  for (Py_ssize_t i = 0; i < count; ++i) {
    state.questions[i] = question_of(PyTuple_GetItem(questions, i));
  }
  state.question_count = static_cast<int>(count);
  return none();
}

/// connect(apply, apply_lse): the autograd functions made of forward and forward_lse.
PyObject* connect(PyObject*, PyObject* arguments) {
  PyObject *apply, *apply_lse;
  if (!PyArg_ParseTuple(arguments, "OO", &apply, &apply_lse)) return nullptr;
  state.apply = Py_NewRef(apply);
  state.apply_lse = Py_NewRef(apply_lse);
  return none();
}

/// pause(+1) and pause(-1): in between, no call of any thread is taken.
PyObject* pause(PyObject*, PyObject* step) {
  const long by = PyLong_AsLong(step);
  if (by == -1 && PyErr_Occurred() != nullptr) return nullptr;
  state.pauses += by;
  return none();
}

template <class Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"setup", setup, METH_VARARGS, nullptr},
    {"connect", connect, METH_VARARGS, nullptr},
    {"pause", pause, METH_O, nullptr},
    {"call", as_method(call), METH_FASTCALL, nullptr},
    {"forward", as_method(forward), METH_FASTCALL, nullptr},
    {"forward_lse", as_method(forward_lse), METH_FASTCALL, nullptr},
    {"backward", as_method(backward), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__direct() {
  state.zero = PyLong_FromLong(0);
  state.one = PyLong_FromLong(1);
  state.profiling = PyUnicode_InternFromString("_is_profiler_enabled");
  state.to_save = PyUnicode_InternFromString("to_save");
  state.options = PyUnicode_InternFromString("options");
  state.materialize_grads = PyUnicode_InternFromString("materialize_grads");
  return PyModule_Create(&module);
}

// SPDX-License-Identifier: Apache-2.0
// Python module `_direct`: plain dense calls on ordinary tensors, past torch's dispatcher, which
// takes longer for such a call than everything else the host does. Tensors are read through
// DLPack's C exchange functions. Every function returns None where the call is anything but plain
// or fails; then the operators run it and raise its errors. Built for the stable ABI of Python
// >= 3.10.
#define Py_LIMITED_API 0x030A0000
#include <ATen/dlpack.h>
#include <Python.h>

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

constexpr int max_questions = 8;

/// What setup() and connect() were given; the references are never dropped.
struct {
  const DirectTable* native = nullptr;
  const DLPackExchangeAPI* dlpack = nullptr;
  PyObject* tensor = nullptr;     ///< torch.Tensor
  PyObject* parameter = nullptr;  ///< torch.nn.Parameter
  PyObject* adopt = nullptr;      ///< makes a Python tensor of a handle
  bool adopt_copies = true;       ///< and leaves the handle as it was
  PyObject* profiler = nullptr;   ///< namespace of torch.autograd.profiler
  PyObject* questions[max_questions] = {};
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
    PyObject* answer = PyObject_CallNoArgs(state.questions[i]);
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

/// A Python tensor that owns what the handle owned.
PyObject* adopt(void* handle) {
  PyObject* capsule = PyCapsule_New(handle, nullptr, nullptr);
  PyObject* tensor = nullptr;
  if (capsule != nullptr) {
    tensor = PyObject_CallFunctionObjArgs(state.adopt, capsule, nullptr);
    Py_DECREF(capsule);
  }
  if (capsule == nullptr || state.adopt_copies) state.native->release(handle);
  return tensor;
}

/// (out, lse), or without an LSE out alone; null with an error set.
bool adopt_results(const DirectForward& call, PyObject** out, PyObject** lse) {
  *out = adopt(call.out);
  *lse = call.softmax_lse == nullptr ? nullptr : adopt(call.softmax_lse);
  if (*out != nullptr && (*lse != nullptr || call.softmax_lse == nullptr)) return true;
  Py_XDECREF(*out);
  Py_XDECREF(*lse);
  return false;
}

template <class Call>
bool run(bool (*function)(Call&) noexcept, Call& call) {
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  done = function(call);
  Py_END_ALLOW_THREADS;
  return done;
}

bool read_inputs(PyObject* q, PyObject* k, PyObject* v, PyObject* sink, DirectForward* call) {
  return read(q, &call->query) && read(k, &call->key) && read(v, &call->value) &&
         read_sink(sink, &call->learnable_sink);
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
  if (!read_inputs(tensors[0], tensors[1], tensors[2], tensors[3], &c)) return not_taken();
  c.want_lse = a[arg_return_attn_probs] == Py_True;
  if (!run(state.native->forward, c)) return none();
  PyObject *out = nullptr, *lse = nullptr;
  if (!adopt_results(c, &out, &lse)) return nullptr;
  if (lse == nullptr) return out;
  PyObject* both = PyTuple_Pack(2, out, lse);
  Py_DECREF(out);
  Py_DECREF(lse);
  return both;
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
  const bool done = count == 6 && read_options(a[5], &c.options) &&
                    read_inputs(a[1], a[2], a[3], a[4], &c) &&
                    c.query.dtype != DType::float8_e4m3 && run(state.native->forward, c);
  if (!done) {
    PyErr_SetString(PyExc_RuntimeError, "sinkattn: the operators run this call");
    return nullptr;
  }
  PyObject *out = nullptr, *lse = nullptr;
  if (!adopt_results(c, &out, &lse)) return nullptr;
  PyObject* result = nullptr;
  if (fill_context(a[0], a + 1, out, lse, a[5])) {
    result = return_lse ? PyTuple_Pack(2, out, lse) : Py_NewRef(out);
  }
  Py_DECREF(out);
  Py_DECREF(lse);
  return result;
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
  c.need_dq = need[0];
  c.need_dkv = need[1] || need[2];
  c.need_dsink = need[3];
  if (!read_options(a[3], &c.options) || !unobserved() || !read_optional(a[0], &c.dout) ||
      !read_optional(a[1], &c.dlse) || !read(saved[0], &c.query) || !read(saved[1], &c.key) ||
      !read(saved[2], &c.value) || !read_sink(saved[3], &c.learnable_sink) ||
      !read(saved[4], &c.out) || !read(saved[5], &c.softmax_lse) ||
      !run(state.native->backward, c)) {
    return not_taken();
  }
  PyObject* results[5] = {};
  bool complete = true;
  for (int i = 0; i < 5; ++i) {
    void* handle = i < 4 ? c.gradients[i] : nullptr;
    PyObject* gradient = handle == nullptr ? none() : adopt(handle);
    if (i < 4 && !need[i] && gradient != nullptr) {  // dk and dv come together
      Py_DECREF(gradient);
      gradient = none();
    }
    results[i] = gradient;
    complete = complete && gradient != nullptr;
  }
  PyObject* tuple =
      !complete ? nullptr
                : PyTuple_Pack(5, results[0], results[1], results[2], results[3], results[4]);
  for (PyObject* result : results) Py_XDECREF(result);
  return tuple;
}

/// setup(address of sinkattn_direct, exchange capsule, Tensor, Parameter, Tensor.requires_grad,
/// adopt, whether adopt copies, namespace of torch.autograd.profiler, questions)
PyObject* setup(PyObject*, PyObject* arguments) {
  unsigned long long address = 0;
  int copies = 0;
  PyObject *capsule, *tensor, *parameter, *requires_grad, *adopt, *profiler, *questions;
  if (!PyArg_ParseTuple(arguments, "KOOOOOpO!O!", &address, &capsule, &tensor, &parameter,
                        &requires_grad, &adopt, &copies, &PyDict_Type, &profiler, &PyTuple_Type,
                        &questions)) {
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
      getter == nullptr || PyDict_GetItemWithError(profiler, state.profiling) == nullptr) {
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
  state.adopt = Py_NewRef(adopt);
  state.adopt_copies = copies != 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    state.questions[i] = Py_NewRef(PyTuple_GetItem(questions, i));
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

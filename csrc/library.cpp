// The schemas of all ops and their CPU implementations. The functions read the dispatcher's stack by hand: a step on a
// small latent costs little more than its call.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "bind.h"
#include "bind_quantile.h"
#include "bind_vectors.h"
#include "cpu/check_rows.h"
#include "cpu/keys.h"
#include "cpu/launch.h"

namespace fastdiff {
namespace {

void step(StableIValue* stack, uint64_t, uint64_t) {
  const StepTensors tensors(stack);
  const StepArgs args = bind_step(tensors);
  if (args.batch == 0 || args.numel == 0) return;
  const IeeeMode mode;
  check_rows(args);
  launch_step(args);
}

// y = 1 N(key), as a table of one row.
void normal(StableIValue* stack, uint64_t, uint64_t) {
  Owned<2> owned;
  const AtenTensorHandle out_handle = owned.tensor(stack[0]), keys_handle = owned.tensor(stack[1]);
  Tensor out("out", -1), keys("keys", -1);
  out.read(out_handle, "normal_");
  keys.read(keys_handle, "normal_");
  StepArgs a{};
  bind_normal(a, out, keys);
  if (a.batch == 0 || a.numel == 0) return;
  const IeeeMode mode;
  launch_step(a);
}

void project(StableIValue* stack, uint64_t, uint64_t) {
  const ProjectTensors tensors(stack);
  const ProjectArgs args = bind_project(tensors);
  if (args.batch == 0 || args.terms.count == 0) return;
  const IeeeMode mode;  // a weight below the normal numbers is not 0
  check_rows(args);
  check_used("project_", args.terms, "basis", args.batch);
  launch_project(args);
}

void lift(StableIValue* stack, uint64_t, uint64_t) {
  const LiftTensors tensors(stack);
  const LiftArgs args = bind_lift(tensors);
  if (args.batch == 0 || args.numel == 0) return;
  const IeeeMode mode;
  check_used("lift_", args.terms, "basis", args.batch);
  launch_lift(args);
}

void edit(StableIValue* stack, uint64_t, uint64_t) {
  const EditTensors tensors(stack);
  const EditArgs args = bind_edit(tensors);
  if (args.batch == 0 || args.numel == 0) return;
  const IeeeMode mode;
  check_used("edit_", args.terms, "bank", args.batch);
  launch_edit(args);
}

void quantile(StableIValue* stack, uint64_t, uint64_t) {
  const QuantileTensors tensors(stack);
  const IeeeMode mode;  // a limit is rounded to float32
  const QuantileArgs args = bind_quantile(tensors);
  if (args.step.batch == 0) return;
  check_rows(args);
  launch_quantile(args);
}

StableIValue from_handle(AtenTensorHandle handle) {
  StableIValue value = 0;
  std::memcpy(&value, &handle, sizeof handle);
  return value;
}

void fold_in_op(StableIValue* stack, uint64_t, uint64_t) {
  Owned<2> owned;
  const AtenTensorHandle keys_handle = owned.tensor(stack[0]), data_handle = owned.tensor(stack[1]);
  Tensor keys("keys", -1), data("data", -1);
  keys.read(keys_handle, "fold_in");
  data.read(data_handle, "fold_in");
  stack[0] = from_handle(fold_in_all(keys, data));
}

void run_keys_op(StableIValue* stack, uint64_t, uint64_t) {
  Owned<3> owned;
  Tensor t[3] = {{"seeds", -1}, {"streams", -1}, {"draws", -1}};
  AtenTensorHandle handles[3];
  for (int i = 0; i < 3; ++i) handles[i] = owned.tensor(stack[i]);
  for (int i = 0; i < 3; ++i) t[i].read(handles[i], "run_keys");
  stack[0] = from_handle(run_keys(t[0], t[1], t[2]));
}

void raw_words_op(StableIValue* stack, uint64_t, uint64_t) {
  Owned<1> owned;
  const AtenTensorHandle keys_handle = owned.tensor(stack[0]);
  int64_t count;
  std::memcpy(&count, &stack[1], sizeof count);
  Tensor keys("keys", -1);
  keys.read(keys_handle, "raw_words");
  stack[0] = from_handle(raw_words(keys, count));
}

StableIValue from_text(const char* text) {
  StringHandle handle;
  FD_SHIM(torch_new_string_handle(text, std::strlen(text), &handle));
  StableIValue value = 0;
  std::memcpy(&value, &handle, sizeof handle);
  return value;
}

void isa(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from_text(kernels().name); }

void usable_isas(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from_text(usable_kernels()); }

void set_isa(StableIValue* stack, uint64_t, uint64_t) {
  StringHandle handle;
  std::memcpy(&handle, &stack[0], sizeof handle);
  const char* text = "";
  size_t length = 0;
  torch_string_c_str(handle, &text);
  torch_string_length(handle, &length);
  const std::string name(text, length);
  torch_delete_string(handle);
  stack[0] = from_text(use_kernels(name.c_str()).name);
}

void set_grain_op(StableIValue* stack, uint64_t, uint64_t) {
  int64_t elements;
  std::memcpy(&elements, &stack[0], sizeof elements);
  elements = set_grain(elements);
  std::memcpy(&stack[0], &elements, sizeof elements);
}

const char* const kSchemas[] = {
#include "fastdiff_schemas.inc"
};

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY(fastdiff, m) {
  for (const char* schema : fastdiff::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("step_", fastdiff::step);
  m.impl("normal_", fastdiff::normal);
  m.impl("project_", fastdiff::project);
  m.impl("lift_", fastdiff::lift);
  m.impl("edit_", fastdiff::edit);
  m.impl("quantile_", fastdiff::quantile);
  m.impl("fold_in", fastdiff::fold_in_op);
  m.impl("run_keys", fastdiff::run_keys_op);
  m.impl("raw_words", fastdiff::raw_words_op);
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CompositeExplicitAutograd, m) {
  m.impl("isa", fastdiff::isa);
  m.impl("usable_isas", fastdiff::usable_isas);
  m.impl("set_isa", fastdiff::set_isa);
  m.impl("set_grain", fastdiff::set_grain_op);
}

// `import fastdiff._C` registers the ops by loading the library; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

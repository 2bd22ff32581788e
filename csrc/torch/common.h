// What the operators of every family share: checks, dtypes, allocation, the thread pool, packed
// weights. This folder is the only C++ that knows torch, and it uses torch's stable ABI alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "core/types.h"
#include "cpu/isa.h"

namespace fmk::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The Python layer refuses bad input first, with better words; these checks keep direct callers of
// torch.ops.fmkernels from reading past a buffer.
#define FMK_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kF32;
    case ScalarType::BFloat16: return DType::kBF16;
    case ScalarType::Half: return DType::kF16;
    case ScalarType::Double: return DType::kF64;
    default:
      FMK_CHECK(false, name, ": expected float32, bfloat16, float16 or float64");
      return DType::kF32;
  }
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  FMK_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& model,
                       const char* model_name) {
  check_cpu(tensor, name);
  FMK_CHECK(tensor.scalar_type() == model.scalar_type(), name, ": expected the dtype of ",
            model_name);
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  FMK_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.data(), sizes.data() + sizes.size());
}

inline std::string to_string(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

inline void check_shape(const Tensor& tensor, const char* name,
                        const std::vector<int64_t>& expected) {
  const std::vector<int64_t> actual = shape_of(tensor);
  FMK_CHECK(actual == expected, name, ": expected shape ", to_string(expected), ", got ",
            to_string(actual));
}

// A contiguous tensor of the given shape and of the model's dtype, as every parameter of a layer
// must be.
inline void check_parameter(const OptionalTensor& tensor, const char* name, const Tensor& model,
                            const std::vector<int64_t>& shape) {
  if (!tensor) return;
  check_like(*tensor, name, model, "input");
  check_shape(*tensor, name, shape);
  check_contiguous(*tensor, name);
}

// Whether FMKERNELS_POISON=1: new tensors then hold NaN (integers: ones in every bit), so that an
// element which a kernel leaves out cannot pass for a result. torch's own switch for that does not
// reach the entry that allocate_strided takes.
inline bool poisons_memory() {
  static const bool poisons = [] {
    const char* setting = std::getenv("FMKERNELS_POISON");
    return setting != nullptr && std::strcmp(setting, "1") == 0;
  }();
  return poisons;
}

// An uninitialised tensor. Through the shim's own entry: a call by the dispatcher, which looks the
// operator up by its name, takes several times as long, and small layers feel that.
inline Tensor allocate_strided(const Tensor& like, const std::vector<int64_t>& shape,
                               const std::vector<int64_t>& strides,
                               std::optional<ScalarType> dtype = std::nullopt) {
  int32_t type, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (dtype) type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()),
                                                         shape.data(), strides.data(), type,
                                                         device_type, device_index, &handle));
  Tensor tensor(handle);
  if (poisons_memory() && tensor.is_cpu() && tensor.numel() > 0) {
    const size_t bytes = static_cast<size_t>(tensor.numel()) * aoti_torch_dtype_element_size(type);
    std::memset(tensor.mutable_data_ptr(), 0xff, bytes);
  }
  return tensor;
}

// The strides of a tensor whose dimensions lie in memory in the given order, outermost first.
inline std::vector<int64_t> strides_of(const std::vector<int64_t>& shape,
                                       const std::vector<size_t>& order) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(shape[order[i]], 1);
  }
  return strides;
}

inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& shape,
                       std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<size_t> order(shape.size());
  std::iota(order.begin(), order.end(), size_t{0});
  return allocate_strided(like, shape, strides_of(shape, order), dtype);
}
// What an operator returns in place of an output that is not wanted.
inline Tensor nothing(const Tensor& like) { return allocate(like, {0}); }
inline Tensor allocate_if(bool wanted, const Tensor& like, const std::vector<int64_t>& shape) {
  return wanted ? allocate(like, shape) : nothing(like);
}

inline const void* data_of(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data_of(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}
inline void* mutable_data_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }
inline void* mutable_data_if(bool wanted, const Tensor& tensor) {
  return wanted ? tensor.mutable_data_ptr() : nullptr;
}

inline Activation activation_from(const std::optional<std::string>& name) {
  if (!name) return Activation::kNone;
  static const std::array<const char*, 13> names{
      "",     "relu",    "relu6", "leaky_relu", "elu",         "gelu", "gelu_tanh",
      "silu", "sigmoid", "tanh",  "hardswish",  "hardsigmoid", "mish"};
  for (size_t i = 1; i < names.size(); ++i)
    if (*name == names[i]) return static_cast<Activation>(i);
  FMK_CHECK(false, "activation: unknown name '", *name, "'");
  return Activation::kNone;
}

// relu's derivative can be told from its output, so nothing more is saved for it.
inline bool needs_preactivation(Activation activation) {
  return activation != Activation::kNone && activation != Activation::kRelu;
}

inline Parallel torch_pool() {
  Parallel pool;
  pool.threads = static_cast<int>(torch::stable::get_num_threads());
  pool.run = [](int64_t count, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, count, 1,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return pool;
}

// --- packed weights: a 64-byte header, then panels as the active ISA's kernels read them ---

enum class PackedKind : int32_t {
  kLinear = 1,
  kConv2d = 2,
  kLstm = 3,
  kGated = 4,
  kGru = 5,
  kRnn = 6,
};

struct PackedHeader {
  char magic[8];
  int32_t isa, kind, dtype, algorithm;
  int64_t dims[5];
};
static_assert(sizeof(PackedHeader) == 64);

inline PackedHeader packed_header(PackedKind kind, DType dtype, const std::array<int64_t, 5>& dims,
                                  int32_t algorithm = 0) {
  PackedHeader header{{'f', 'm', 'k', 'p', 'a', 'c', 'k', '1'},
                      static_cast<int32_t>(active_isa()),
                      static_cast<int32_t>(kind),
                      static_cast<int32_t>(dtype),
                      algorithm,
                      {}};
  std::memcpy(header.dims, dims.data(), sizeof header.dims);
  return header;
}

// A uint8 tensor holding `header` and room for `bytes` bytes; *panels is set to the latter.
inline Tensor new_packed(const Tensor& like, const PackedHeader& header, size_t bytes,
                         void** panels) {
  Tensor packed = allocate(like, {static_cast<int64_t>(sizeof header + bytes)}, ScalarType::Byte);
  auto* data = static_cast<char*>(packed.mutable_data_ptr());
  std::memcpy(data, &header, sizeof header);
  *panels = data + sizeof header;
  return packed;
}

// The panels inside `packed`, or null if there is no packed weight; refuses one made for anything
// else than `expected`.
inline const void* panels_of(const OptionalTensor& packed, const PackedHeader& expected,
                             size_t bytes) {
  if (!packed) return nullptr;
  check_cpu(*packed, "packed_weight");
  FMK_CHECK(packed->scalar_type() == ScalarType::Byte && packed->dim() == 1 &&
                packed->is_contiguous() &&
                packed->numel() == static_cast<int64_t>(sizeof expected + bytes),
            "packed_weight: expected a 1-D uint8 tensor of ", sizeof expected + bytes, " elements");
  const auto* data = static_cast<const char*>(packed->const_data_ptr());
  FMK_CHECK(std::memcmp(data, &expected, sizeof expected) == 0,
            "packed_weight: packed for another layer, dtype or instruction set; pack it again");
  return data + sizeof expected;
}

}  // namespace fmk::ops

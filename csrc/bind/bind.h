// What the binding files share. Arguments are checked here, at the boundary; below it they are asserted.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace nb = nanobind;

namespace elute {

// Throws std::invalid_argument for a name that is none.
CacheType cache_type_named(const std::string& name);

template <typename T, size_t Dims>
using ArrayIn = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using HalvesIn = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu, nb::ro>;  // float16, checked by hand

template <typename T>
inline nb::object owned_array(std::unique_ptr<T[]> data, std::initializer_list<size_t> shape) {
  T* raw = data.release();
  nb::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(raw, shape, owner));
}

inline const KernelTable& kernels_named(const std::string& isa) {
  const KernelTable* table = find_kernels(isa);
  if (!table) throw std::invalid_argument("isa: found '" + isa + "', wanted one that this CPU runs (see isas())");
  return *table;
}

// A view of packed arrays, with every size checked.
MatrixView matrix_view(const ArrayIn<uint8_t, 1>& planes, const HalvesIn& scales, const std::optional<HalvesIn>& offsets,
                       int n, int k, int bits, int group_size, int zero, const std::string& affine,
                       int padding = kPlanesPadding);

// The same of scales and offsets alone; its planes are null.
MatrixView affine_view(const HalvesIn& scales, const std::optional<HalvesIn>& offsets, int n, int k, int bits, int group_size,
                       int zero, const std::string& affine);

void bind_kernels(nb::module_& m);
void bind_float_kernels(nb::module_& m);
void bind_executor(nb::module_& m);
void bind_flash(nb::module_& m);
void bind_banks(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_shadow(nb::module_& m);
void bind_bench(nb::module_& m);

}  // namespace elute

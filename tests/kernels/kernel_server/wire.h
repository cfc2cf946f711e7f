// Requests and replies on stdin and stdout, as ../emulated.py writes and reads them, little-endian:
//   message  u64 number of values, values
//   value    a kind, then: i i64 · f f64 · s u64 length, bytes · a dtype, u8 ndim, u64 sides, data · n nothing
//   dtype    d f64 · f f32 · e f16 · b i8 · B u8 · i i32 · q i64, numpy's characters
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace elute {

template <typename T>
struct DtypeOf;
template <> struct DtypeOf<double> { static constexpr char value = 'd'; };
template <> struct DtypeOf<float> { static constexpr char value = 'f'; };
template <> struct DtypeOf<uint16_t> { static constexpr char value = 'e'; };
template <> struct DtypeOf<int8_t> { static constexpr char value = 'b'; };
template <> struct DtypeOf<uint8_t> { static constexpr char value = 'B'; };
template <> struct DtypeOf<int32_t> { static constexpr char value = 'i'; };
template <> struct DtypeOf<int64_t> { static constexpr char value = 'q'; };

// The data's last byte is the last readable one: a kernel that reads beyond it dies.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t count);
  ~GuardedBytes();
  GuardedBytes(const GuardedBytes&) = delete;
  void* data() const { return data_; }

 private:
  void* mapped_;
  size_t mapped_bytes_;
  void* data_;
};

struct AnyArray {
  char dtype;
  std::vector<size_t> shape;
  std::shared_ptr<GuardedBytes> bytes;
};
template <typename T>
class Array {
 public:
  explicit Array(AnyArray any) : any_(std::move(any)) {}
  T* data() const { return static_cast<T*>(any_.bytes->data()); }
  int shape(int i) const { return static_cast<int>(any_.shape.at(i)); }
  const std::vector<size_t>& sides() const { return any_.shape; }
  int64_t size() const {
    int64_t count = 1;
    for (size_t side : any_.shape) count *= side;
    return count;
  }

 private:
  AnyArray any_;
};

// Values of a request, taken one by one. Throws std::runtime_error at one of another kind.
class Request {
 public:
  bool receive();  // false at the end of stdin
  int64_t integer();
  double number();
  std::string text();
  template <typename T>
  Array<T> array() { return Array<T>(any_array(DtypeOf<T>::value)); }
  template <typename T>
  std::optional<Array<T>> optional_array() {
    if (peek() == 'n') {
      ++next_;
      return std::nullopt;
    }
    return array<T>();
  }
  template <typename T>
  bool is_array_of() const { return peek() == 'a' && values_[next_].array.dtype == DtypeOf<T>::value; }
  template <typename T>
  std::vector<T> list() {
    const Array<T> values = array<T>();
    return {values.data(), values.data() + values.size()};
  }

 private:
  struct Value {
    char kind;
    int64_t integer;
    double number;
    std::string text;
    AnyArray array;
  };
  char peek() const;
  const Value& take(char kind);
  AnyArray any_array(char dtype);

  std::vector<Value> values_;
  size_t next_ = 0;
};

class Reply {
 public:
  void add(int64_t value) { add_value('i', &value, sizeof value); }
  void add(double value) { add_value('f', &value, sizeof value); }
  void add(const std::string& text);
  template <typename T>
  void add(const T* data, const std::vector<size_t>& shape) {
    size_t count = sizeof(T);
    for (size_t side : shape) count *= side;
    add_array(DtypeOf<T>::value, data, count, shape);
  }
  template <typename T>
  void add(const Array<T>& array) { add(array.data(), array.sides()); }
  void send() const;

 private:
  void add_value(char kind, const void* data, size_t count);
  void add_array(char dtype, const void* data, size_t count, const std::vector<size_t>& shape);

  uint64_t n_values_ = 0;
  std::string bytes_;
};

}  // namespace elute

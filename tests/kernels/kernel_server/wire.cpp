#include "wire.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <new>
#include <stdexcept>

namespace elute {
namespace {

bool read_bytes(void* to, size_t count) { return std::fread(to, 1, count, stdin) == count; }
template <typename T>
T read_as() {
  T value;
  if (!read_bytes(&value, sizeof value)) throw std::runtime_error("stdin ended inside a request");
  return value;
}

size_t item_bytes(char dtype) { return dtype == 'd' || dtype == 'q' ? 8 : dtype == 'f' || dtype == 'i' ? 4 : dtype == 'e' ? 2 : 1; }

}  // namespace

GuardedBytes::GuardedBytes(size_t count) {
  const size_t page = sysconf(_SC_PAGESIZE);
  const size_t room = (count + page - 1) / page * page;
  mapped_bytes_ = room + page;
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  char* const start = static_cast<char*>(mapped_);
  if (mprotect(start + room, page, PROT_NONE) != 0) throw std::bad_alloc();
  data_ = start + room - count;
}
GuardedBytes::~GuardedBytes() { munmap(mapped_, mapped_bytes_); }

bool Request::receive() {
  uint64_t n_values;
  if (!read_bytes(&n_values, sizeof n_values)) return false;
  values_.clear();
  next_ = 0;
  for (uint64_t i = 0; i < n_values; ++i) {
    Value value{};
    value.kind = read_as<char>();
    if (value.kind == 'i') value.integer = read_as<int64_t>();
    else if (value.kind == 'f') value.number = read_as<double>();
    else if (value.kind == 's') {
      value.text.resize(read_as<uint64_t>());
      if (!read_bytes(value.text.data(), value.text.size())) throw std::runtime_error("stdin ended inside a text");
    } else if (value.kind == 'a') {
      value.array.dtype = read_as<char>();
      value.array.shape.resize(read_as<uint8_t>());
      size_t count = item_bytes(value.array.dtype);
      for (size_t& side : value.array.shape) count *= side = read_as<uint64_t>();
      value.array.bytes = std::make_shared<GuardedBytes>(count);
      if (!read_bytes(value.array.bytes->data(), count)) throw std::runtime_error("stdin ended inside an array");
    } else if (value.kind != 'n') {
      throw std::runtime_error(std::string("found a value of kind '") + value.kind + "'");
    }
    values_.push_back(std::move(value));
  }
  return true;
}

char Request::peek() const {
  if (next_ == values_.size()) throw std::runtime_error("the request has too few values");
  return values_[next_].kind;
}
const Request::Value& Request::take(char kind) {
  if (peek() != kind) throw std::runtime_error(std::string("found a value of kind '") + peek() + "', wanted '" + kind + "'");
  return values_[next_++];
}
int64_t Request::integer() { return take('i').integer; }
double Request::number() { return take('f').number; }
std::string Request::text() { return take('s').text; }
AnyArray Request::any_array(char dtype) {
  const AnyArray& array = take('a').array;
  if (array.dtype != dtype)
    throw std::runtime_error(std::string("found an array of '") + array.dtype + "', wanted '" + dtype + "'");
  return array;
}

void Reply::add_value(char kind, const void* data, size_t count) {
  ++n_values_;
  bytes_ += kind;
  bytes_.append(static_cast<const char*>(data), count);
}
void Reply::add(const std::string& text) {
  const uint64_t size = text.size();
  add_value('s', &size, sizeof size);
  bytes_ += text;
}
void Reply::add_array(char dtype, const void* data, size_t count, const std::vector<size_t>& shape) {
  const char head[2] = {dtype, static_cast<char>(shape.size())};
  add_value('a', head, sizeof head);
  for (const uint64_t side : shape) bytes_.append(reinterpret_cast<const char*>(&side), sizeof side);
  bytes_.append(static_cast<const char*>(data), count);
}
void Reply::send() const {
  std::fwrite(&n_values_, sizeof n_values_, 1, stdout);
  std::fwrite(bytes_.data(), 1, bytes_.size(), stdout);
  std::fflush(stdout);
}

}  // namespace elute

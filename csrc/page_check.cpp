#include "page_check.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "crc32c.h"

namespace elute {
namespace {

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};

constexpr int64_t kHugePage = 2 << 20;

struct Span {
  int64_t first, n_pages;
};

}  // namespace

std::vector<BadPage> bad_pages(const FlashFile& file, FlashReader& reader, int64_t first, int64_t n_pages,
                               const uint32_t* wanted, int64_t request_bytes, bool forget) {
  static_assert(kSummedPage == kFlashAlignment);
  const int depth = reader.depth();
  const int64_t n_memory = (depth * request_bytes + kHugePage - 1) / kHugePage * kHugePage;
  const std::unique_ptr<uint8_t[], Free> memory(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, n_memory)));
  if (!memory) throw std::bad_alloc();
  madvise(memory.get(), n_memory, MADV_HUGEPAGE);  // a direct read pins each page of its memory
  std::vector<Span> wishes, spans(depth);  // wishes: last first
  const int64_t most = request_bytes / kSummedPage;
  for (int64_t at = (n_pages - 1) / most * most; at >= 0; at -= most)
    wishes.push_back({first + at, std::min(most, n_pages - at)});
  std::vector<int> free;
  for (int slot = depth; slot-- > 0;) free.push_back(slot);
  std::vector<BadPage> bad;
  while (!wishes.empty() || static_cast<int>(free.size()) < depth) {
    while (!wishes.empty() && !free.empty()) {
      const int slot = free.back();
      free.pop_back();
      const Span& span = spans[slot] = wishes.back();
      wishes.pop_back();
      reader.submit({file.descriptor(), span.first * kSummedPage, span.n_pages * kSummedPage,
                     memory.get() + slot * request_bytes, slot});
    }
    const FlashDone done = reader.wait();
    const Span span = spans[done.id];
    const uint8_t* data = memory.get() + done.id * request_bytes;
    free.push_back(static_cast<int>(done.id));
    if (done.error && span.n_pages == 1) bad.push_back({span.first, done.error, 0});
    if (done.error && span.n_pages > 1)  // which of them?
      for (int64_t page = span.n_pages; page-- > 0;) wishes.push_back({span.first + page, 1});
    if (done.error) continue;
    for (int64_t page = 0; page < span.n_pages; ++page) {
      uint32_t found = 0;
      page += first_wrong_page(data + page * kSummedPage, span.n_pages - page, wanted + span.first - first + page, &found);
      if (page < span.n_pages) bad.push_back({span.first + page, 0, found});
    }
    if (forget) file.forget(span.first * kSummedPage, span.n_pages * kSummedPage);
  }
  std::sort(bad.begin(), bad.end(), [](const BadPage& a, const BadPage& b) { return a.page < b.page; });
  return bad;
}

}  // namespace elute

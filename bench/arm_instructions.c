// A plug-in of qemu (API version 1, as of Debian 12's qemu-user 7.2): how often each instruction was executed, written to
// the file of the option out= as lines "address count". Debian ships no qemu-plugin.h, so what is used is declared here.
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void*), void*);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb*, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn*);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn*, enum qemu_plugin_op, void*, uint64_t);

EXPORT int qemu_plugin_version = 1;

struct counter {
  uint64_t address, count;
  struct counter* next;
};
static struct counter* buckets[1 << 16];
static const char* out_path;

// The counter of an address; a block may be translated more than once.
static struct counter* counter_of(uint64_t address) {
  struct counter** bucket = &buckets[address >> 2 & 0xffff];
  for (struct counter* c = *bucket; c; c = c->next)
    if (c->address == address) return c;
  struct counter* c = calloc(1, sizeof *c);
  if (!c) abort();
  c->address = address;
  c->next = *bucket;
  return *bucket = c;
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb* block) {
  (void)id;
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); ++i) {
    struct qemu_plugin_insn* instruction = qemu_plugin_tb_get_insn(block, i);
    struct counter* c = counter_of(qemu_plugin_insn_vaddr(instruction));
    qemu_plugin_register_vcpu_insn_exec_inline(instruction, QEMU_PLUGIN_INLINE_ADD_U64, &c->count, 1);
  }
}

static void on_exit_write(qemu_plugin_id_t id, void* nothing) {
  (void)id, (void)nothing;
  FILE* out = fopen(out_path, "w");
  if (!out) abort();
  for (size_t i = 0; i < sizeof buckets / sizeof *buckets; ++i)
    for (struct counter* c = buckets[i]; c; c = c->next)
      if (c->count) fprintf(out, "%" PRIx64 " %" PRIu64 "\n", c->address, c->count);
  fclose(out);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void* info, int n_options, char** options) {
  (void)info;
  for (int i = 0; i < n_options; ++i)
    if (strncmp(options[i], "out=", 4) == 0) out_path = strdup(options[i] + 4);
  if (!out_path) return -1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  qemu_plugin_register_atexit_cb(id, on_exit_write, NULL);
  return 0;
}

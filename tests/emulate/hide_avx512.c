/* Preloaded by without_avx512.py: answers every `cpuid` that was replaced by `int3; nop` as a processor
 * with AVX2 and FMA would that has neither AVX-512, AVX-VNNI nor AMX. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdlib.h>
#include <ucontext.h>

#define BIT(n) (1u << (n))

/* Leaf 7: F DQ IFMA PF ER CD BW VL, then VBMI VBMI2 VNNI BITALG VPOPCNTDQ, then 4VNNIW 4FMAPS
 * VP2INTERSECT AMX-BF16 FP16 AMX-TILE AMX-INT8. */
static const unsigned kHidden7B =
    BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31);
static const unsigned kHidden7C = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14);
static const unsigned kHidden7D =
    BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25);
/* Its second page: AVX-VNNI BF16 AMX-FP16 AVX-IFMA, then AVX-VNNI-INT8 AVX-NE-CONVERT AMX-COMPLEX
 * AVX-VNNI-INT16 AVX10. */
static const unsigned kHidden71A = BIT(4) | BIT(5) | BIT(21) | BIT(23);
static const unsigned kHidden71D = BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19);

static void answer(int number, siginfo_t* info, void* context) {
  (void)number;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* next = (const unsigned char*)registers[REG_RIP];
  if (info->si_code != SI_KERNEL || next[-1] != 0xcc || next[0] != 0x90) abort();
  const unsigned leaf = (unsigned)registers[REG_RAX], page = (unsigned)registers[REG_RCX];
  unsigned a, b, c, d;
  __cpuid_count(leaf, page, a, b, c, d);
  if (leaf == 7 && page == 0) b &= ~kHidden7B, c &= ~kHidden7C, d &= ~kHidden7D;
  if (leaf == 7 && page == 1) a &= ~kHidden71A, d &= ~kHidden71D;
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {0};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(SIGTRAP, &action, 0);
}

// Switches to another stack. Callee-saved registers are pushed onto the old one (x86-64, System V).
asm(R"(
.text
.globl cuda_on_host_switch
cuda_on_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

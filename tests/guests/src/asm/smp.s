# Bring-up of a second CPU, for guests that use it. `second_cpu g` makes `g_start_second_cpu`: CF set if it did not come.
# The second CPU enters the guest at `g_second_main` with its own stack, in 64-bit mode, its local APIC on, interrupts off;
# [g_second_id] is then its APIC ID. The calling CPU's local APIC must be on.

.set TRAMPOLINE, 0x8000                 # a page below 1 MiB, as INIT and SIPI need
.set TRAMPOLINE_GDTR, 8                 # offsets of its data
.set TRAMPOLINE_CR3, 16
.set TRAMPOLINE_TARGET, 20

.macro second_cpu g
\g\()_start_second_cpu:
    lea rsi, [rip + \g\()_trampoline]
    mov edi, TRAMPOLINE
    mov ecx, 128
    rep movsb
    mov edi, TRAMPOLINE
    lea rax, [rip + \g\()_gdt]
    mov [rdi + TRAMPOLINE_GDTR + 2], eax
    mov eax, [rip + \g\()_workspace]
    mov [rdi + TRAMPOLINE_CR3], eax
    lea rax, [rip + \g\()_second_start]
    mov [rdi + TRAMPOLINE_TARGET], eax

    mov eax, 0xc4500                    # INIT, to all but this CPU
    call \g\()_apic_ipi
    mov ebx, 2                          # SIPI twice, as the SDM has it (volume 3, 9.4.4.1)
1:  mov ecx, 200                        # for hardware that needs a while after INIT
2:  pause
    loop 2b
    mov eax, 0xc4600 | (TRAMPOLINE >> 12)
    call \g\()_apic_ipi
    dec ebx
    jnz 1b

    call \g\()_deadline
3:  cmp dword ptr [rip + \g\()_second_ready], 1
    je 4f                               # leaves CF clear
    pause
    call \g\()_expired
    jnc 3b
4:  ret

\g\()_second_start:
    mov eax, 1
    lock xadd [rip + \g\()_second_ticket], eax
    test eax, eax
    jnz 1f
    mov rsp, [rip + \g\()_workspace]
    add rsp, WS_STACK_AP
    call \g\()_cpu_start
    cmp dword ptr [rip + \g\()_apic_mode], 2
    jne 2f
    mov ecx, 0x1b                       # into x2APIC mode, as the first CPU is
    rdmsr
    or eax, 0x400
    wrmsr
2:  call \g\()_apic_start
    call \g\()_apic_id
    mov [rip + \g\()_second_id], eax
    mov dword ptr [rip + \g\()_second_ready], 1
    jmp \g\()_second_main
1:  cli                                 # a third CPU and more: not wanted
    hlt
    jmp 1b

    .balign 4
\g\()_second_ticket:
    .long 0
\g\()_second_ready:
    .long 0
\g\()_second_id:
    .long 0

    .balign 16
\g\()_trampoline:
    .code16
    jmp 1f
    .zero TRAMPOLINE_GDTR - (. - \g\()_trampoline)
    .word 31                            # GDTR
    .long 0
    .word 0
    .long 0                             # CR3
    .long 0                             # where to go
    .word 0x10
1:  cli
    mov ax, cs
    mov ds, ax
    lgdtd [TRAMPOLINE_GDTR]
    mov eax, cr4
    or eax, 0x20                        # PAE
    mov cr4, eax
    mov eax, [TRAMPOLINE_CR3]
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER
    rdmsr
    or eax, 0x100                       # LME
    wrmsr
    mov eax, cr0
    and eax, 0x9fffffff                 # caches on
    or eax, 0x80000001                  # PG, PE
    mov cr0, eax
    .byte 0x66, 0xff, 0x2e              # jmp far dword ptr [TRAMPOLINE_TARGET]
    .word TRAMPOLINE_TARGET
    .code64
.endm

# A guest that does what no driver would: port, memory-mapped and MSR accesses at random, without end or `count=` times.
#
# What would end the guest, or let KVM write into the guest's own code, it leaves alone: see `hostile_ports`, `hostile_msrs`
# and `hostile_address`. R12 = the generator's state, R13 = operations left, R14 = operations done.

.set FAR, 0xf00000000                   # 60 GiB: beyond RAM, within what every CPU can address

    image hostile

hostile_main:
    mov r12d, 1
    mov r13d, 1000
    mov rax, r12
    word_of hostile, "seed="
    mov r12, rax
    mov rax, r13
    word_of hostile, "count="
    mov r13, rax
    mov rax, 0x9e3779b97f4a7c15         # neighbouring seeds begin far apart
    imul r12, rax
    or r12, 1                           # 0 would stay 0
    xor r14d, r14d
    handle hostile, 13, hostile_protection_fault

    mov rbp, [rip + hostile_workspace]  # the gigabyte at 60 GiB, once in a page directory of 2 MiB pages
    lea rdi, [rbp + WS_FREE]
    lea rax, [rdi + 3]
    mov [rbp + WS_PDPT + 8 * (FAR >> 30)], rax
    mov rax, FAR + 0x83
    mov ecx, 512
1:  stosq
    add rax, 0x200000
    loop 1b

hostile_next:
    sub r13, 1
    jc hostile_done
    inc r14
    call hostile_random
    mov ebx, eax
    and ebx, 7
    lea rcx, [rip + hostile_kinds]
    movsxd rbx, dword ptr [rcx + 4 * rbx]
    add rbx, rcx
    shr rax, 3                          # 61 random bits for the operation
    call rbx
    test r14, 255
    jnz hostile_next
    mov eax, r14d
    and eax, 0xffffff
    mov edx, TEST_PROGRESS
    out dx, eax
    jmp hostile_next

hostile_done:
    mov eax, r14d
    and eax, 0xffffff
    mov edx, TEST_PROGRESS
    out dx, eax
    jmp hostile_finish

    .balign 4
hostile_kinds:
    .long hostile_out - hostile_kinds
    .long hostile_in - hostile_kinds
    .long hostile_outs - hostile_kinds
    .long hostile_ins - hostile_kinds
    .long hostile_load - hostile_kinds
    .long hostile_store - hostile_kinds
    .long hostile_string - hostile_kinds
    .long hostile_msr - hostile_kinds

hostile_random:                         # RAX = R12 = the next number of xorshift64
    mov rax, r12
    shl rax, 13
    xor r12, rax
    mov rax, r12
    shr rax, 7
    xor r12, rax
    mov rax, r12
    shl rax, 17
    xor r12, rax
    mov rax, r12
    ret

# --- Ports ---

# EDX = port from RAX, RAX shifted on. Half of them among the PC's own. Returns to the caller's caller if it is one to leave alone.
hostile_port:
    movzx edx, ax
    shr rax, 16
    test al, 1
    jz 1f
    and edx, 0x7ff
1:  shr rax, 1
    lea rsi, [rip + hostile_ports]
2:  movzx ecx, word ptr [rsi]
    jrcxz 4f
    cmp edx, ecx
    jb 3f
    cmp dx, [rsi + 2]
    ja 3f
    pop rcx
    ret
3:  add rsi, 4
    jmp 2b
4:  ret

hostile_ports:                          # first and last port; the first are 3 early, because a dword reaches over four
    .word 0x61, 0x64                    # keyboard controller: resets the CPU
    .word 0x8f, 0x92                    # fast A20 and reset
    .word 0xaf, 0xb3                    # ACPI enable
    .word 0x4fd, 0x505                  # isa-debug-exit, pvpanic
    .word 0x5dd, 0x60f                  # the test device, ACPI PM
    .word 0xcf6, 0xcf9                  # reset
    .word 0

hostile_out:
    call hostile_port
    mov ecx, eax
    and ecx, 3
    shr rax, 2
    cmp ecx, 1
    jb 1f
    je 2f
    out dx, eax
    ret
1:  out dx, al
    ret
2:  out dx, ax
    ret

hostile_in:
    call hostile_port
    and eax, 3
    cmp eax, 1
    jb 1f
    je 2f
    in eax, dx
    ret
1:  in al, dx
    ret
2:  in ax, dx
    ret

hostile_outs:
    call hostile_port
    lea rsi, [rip + hostile_payload]    # any bytes will do
    mov ecx, eax
    shr ecx, 2
    and ecx, 31
    and eax, 3
    cmp eax, 1
    jb 1f
    je 2f
    rep outsd
    ret
1:  rep outsb
    ret
2:  rep outsw
    ret

hostile_ins:
    call hostile_port
    lea rdi, [rip + hostile_space]
    mov ecx, eax
    shr ecx, 2
    and ecx, 31
    and eax, 3
    cmp eax, 1
    jb 1f
    je 2f
    rep insd
    ret
1:  rep insb
    ret
2:  rep insw
    ret

# --- Memory-mapped ---

# RDI = an address in 3 to 4 GiB, or beyond RAM, from RAX; RAX shifted on. One in four is at a page's end, one in four near
# a register of the I/O APIC or HPET. Returns to the caller's caller for the local APIC, whose command register can stop CPUs.
hostile_address:
    mov edi, eax
    or edi, 0xc0000000
    shr rax, 30
    mov ecx, eax
    shr rax, 5
    test cl, 3
    jnz 1f
    or edi, 0xff9
    jmp 3f
1:  test cl, 12
    jnz 3f
    and edi, 0x3ff                      # 0xfec00000 or 0xfed00000
    or edi, 0xfec00000
    test cl, 16
    jz 3f
    or edi, 0x100000
3:  mov ecx, edi
    sub ecx, 0xfee00000 - 64
    cmp ecx, 0x1000 + 64
    jb 4f
    and ecx, 31                         # one in 32 beyond RAM
    jnz 5f
    and edi, 0x3ffff000
    or edi, ecx
    mov rcx, FAR
    add rdi, rcx
    ret
4:  pop rcx
5:  ret

hostile_load:
    call hostile_address
    and eax, 7
    cmp eax, 1
    jb 1f
    je 2f
    cmp eax, 3
    jb 3f
    je 4f
    cmp eax, 4
    je 5f
    mov rax, [rdi]
    ret
1:  mov al, [rdi]
    ret
2:  movzx eax, word ptr [rdi]
    ret
3:  mov eax, [rdi]
    ret
4:  movups xmm0, [rdi]
    ret
5:  cmp [rdi], rax
    ret

hostile_store:
    call hostile_address
    mov ecx, eax
    and ecx, 7
    shr rax, 3
    cmp ecx, 1
    jb 1f
    je 2f
    cmp ecx, 3
    jb 3f
    je 4f
    cmp ecx, 5
    jb 5f
    je 6f
    mov [rdi], rax
    ret
1:  mov [rdi], al
    ret
2:  mov [rdi], ax
    ret
3:  mov [rdi], eax
    ret
4:  movups [rdi], xmm0
    ret
5:  or [rdi], eax                       # read, change, write
    ret
6:  lock xadd [rdi], eax
    ret

hostile_string:
    call hostile_address
    lea rsi, [rip + hostile_space]
    mov ecx, eax
    shr ecx, 1
    and ecx, 31
    test al, 1
    jz 1f
    xchg rsi, rdi
1:  rep movsb
    ret

# --- MSRs ---

# Half of the indices are near ones that CPUs have. Most others raise #GP, and the handler skips the instruction.
hostile_msr:
    mov ecx, eax
    shr rax, 32
    test al, 1
    jz 2f
    mov edx, ecx
    and ecx, 0x3ff                      # 0 .. 3ff, and where bit 10 or 11 is set, higher ranges
    bt edx, 10
    jnc 1f
    or ecx, 0xc0000000
    bt edx, 12
    jnc 1f
    or ecx, 0x10000
1:  bt edx, 11
    jnc 2f
    or ecx, 0x800
2:  shr eax, 1
    test al, 1
    jnz hostile_write_msr
hostile_rdmsr:
    rdmsr
    ret
hostile_write_msr:
    lea rsi, [rip + hostile_msrs]
3:  cmp dword ptr [rsi + 4], 0
    je 5f
    cmp ecx, [rsi]
    jb 4f
    cmp ecx, [rsi + 4]
    ja 4f
    ret
4:  add rsi, 8
    jmp 3b
5:  shr eax, 1
    mov edx, eax
    test al, 1                          # small numbers for half of them
    jz hostile_wrmsr
    and eax, 0xff
    xor edx, edx
hostile_wrmsr:
    wrmsr
    ret

hostile_msrs:                           # first and last index that is not written
    .long 0x11, 0x12                    # KVM's old clock: writes to memory
    .long 0x1b, 0x1b                    # APIC base
    .long 0x1d9, 0x1d9                  # debug control
    .long 0x830, 0x83f                  # x2APIC: interrupts to other CPUs and itself
    .long 0x40000000, 0x400001ff        # Hyper-V's pages
    .long 0x4b564d00, 0x4b564dff        # KVM's clocks and pages
    .long 0xc0000080, 0xc0000080        # EFER
    .long 0, 0

hostile_protection_fault:
    mov rax, [rdi + FRAME_RIP]
    lea rcx, [rip + hostile_rdmsr]
    cmp rax, rcx
    je 1f
    lea rcx, [rip + hostile_wrmsr]
    cmp rax, rcx
    jne hostile_unexpected
1:  add qword ptr [rdi + FRAME_RIP], 2
    ret

    .balign 16
hostile_space:
    .zero 128
    end_of_image hostile

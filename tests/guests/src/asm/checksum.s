# A guest that computes for ever and notices if anything it relies on changes under it: for save, kill and restore.
#
# Each iteration gives new contents to every kind of state, works through memory, ports and MMIO, and then checks that all
# is as it was given. The contents follow from a linear congruential sequence, kept twice: in R12 and in memory.
#
# R12 = the sequence, R14D = iteration, R15 = the CPU's block, all three for ever.

.set TICK_VECTOR, 48
.set MMIO, 0xd0000000                   # the test device's: the byte at address a is a ^ a >> 8

# A CPU's block
.set CPU_NUMBER, 0
.set CPU_TICKS, 4                       # timer interrupts taken
.set CPU_SEQUENCE, 8
.set CPU_BUFFER, 16                     # address of its first page
.set CPU_TEMP, 32                       # 32 bytes
.set CPU_GIVEN, 0x200                   # FXSAVE image loaded
.set CPU_FOUND, 0x400                   # FXSAVE image found
.set CPU_BLOCK, 0x1000                  # its length

.macro must_hold number, condition      # ends the guest with check `number` failed unless `condition`
    j\condition 77f
    mov eax, \number
    jmp checksum_broken
77:
.endm

    image checksum

checksum_main:
    word_of checksum, "pages="
    jc 1f
    mov [rip + checksum_pages], rax
1:  word_of checksum, "cpus="
    jc 2f
    mov [rip + checksum_cpus], rax
2:  word_of checksum, "ports="
    jc 3f
    mov [rip + checksum_ports], rax
3:  word_of checksum, "mmio="
    jc 4f
    mov [rip + checksum_mmio], rax
4:  call checksum_apic_start
    test eax, eax
    must_hold 1, nz                     # there is a local APIC
    handle checksum, TICK_VECTOR, checksum_tick

    mov r15, [rip + checksum_workspace]
    lea rax, [r15 + WORKSPACE]          # the first CPU's buffer is behind the workspace, the second's behind that
    add r15, WS_FREE
    mov [r15 + CPU_BUFFER], rax
    mov rcx, [rip + checksum_pages]
    mov rdx, rcx
    dec rdx
    cmp rdx, 1 << 24
    must_hold 2, b                      # 1 to 64 Gi of buffer
    shl rcx, 12
    add rax, rcx
    cmp qword ptr [rip + checksum_cpus], 2
    jne 5f
    mov [r15 + CPU_BLOCK + CPU_BUFFER], rax
    mov dword ptr [r15 + CPU_BLOCK + CPU_NUMBER], 1
    add rax, rcx
5:  call checksum_check_fits
    cmp qword ptr [rip + checksum_cpus], 2
    jne checksum_run
    call checksum_start_second_cpu
    must_hold 4, nc                     # the second CPU comes
    jmp checksum_run

# Ends the guest unless memory is RAM up to RAX: the e820 range that holds this code must reach so far.
checksum_check_fits:
    mov rcx, 1 << 32
    cmp rax, rcx
    must_hold 3, be                     # the guest's page tables end there
    mov rsi, [rip + checksum_boot_params]
    test rsi, rsi
    jz 3f                               # not told: trust the caller
    movzx ecx, byte ptr [rsi + 0x1e8]
    jrcxz 3f
    add rsi, 0x2d0
    lea rdi, [rip + checksum_payload]
1:  mov rdx, [rsi]
    cmp rdx, rdi
    ja 2f
    add rdx, [rsi + 8]
    cmp rdx, rdi
    jbe 2f
    cmp rax, rdx
    must_hold 3, be
    ret
2:  add rsi, 20
    loop 1b
3:  ret

checksum_second_main:
    mov r15, [rip + checksum_workspace]
    add r15, WS_FREE + CPU_BLOCK

checksum_run:                           # both CPUs
    mov eax, [r15 + CPU_NUMBER]
    mov r12, 0x123456789abcdef
    add r12, rax                        # no two CPUs see the same
    mov [r15 + CPU_SEQUENCE], r12
    xor r14d, r14d
    mov dword ptr [r15 + CPU_TICKS], 0
    mov ecx, APIC_TIMER_DIVIDE
    mov eax, 3                          # by 16
    call checksum_apic_write
    mov ecx, APIC_LVT_TIMER
    mov eax, 0x20000 | TICK_VECTOR      # periodic
    call checksum_apic_write
    mov ecx, APIC_TIMER_INITIAL
    mov eax, 625000                     # 10 ms of KVM's 1 GHz
    call checksum_apic_write
    sti

checksum_iteration:
    inc r14d

    # The sequence in a register and in memory
    mov rax, 6364136223846793005
    imul r12, rax
    mov rcx, 1442695040888963407
    add r12, rcx
    imul rax, [r15 + CPU_SEQUENCE]
    add rax, rcx
    mov [r15 + CPU_SEQUENCE], rax
    cmp [r15 + CPU_SEQUENCE], r12
    must_hold 5, e

    call checksum_give
    call checksum_buffer
    call checksum_stack
    cmp qword ptr [rip + checksum_ports], 0
    je 1f
    call checksum_try_ports
1:  cmp qword ptr [rip + checksum_mmio], 0
    je 2f
    call checksum_try_mmio
2:  call checksum_find

    test r14d, 15                       # now and then: the timer must still tick, and HLT must end with it
    jnz 4f
    mov eax, [r15 + CPU_TICKS]
3:  hlt
    cmp [r15 + CPU_TICKS], eax
    je 3b
4:  mov eax, r14d
    and eax, 0xffffff
    mov ecx, [r15 + CPU_NUMBER]
    shl ecx, 24
    or eax, ecx
    mov edx, TEST_PROGRESS
    out dx, eax
    jmp checksum_iteration

checksum_tick:
    inc dword ptr [r15 + CPU_TICKS]     # R15 is the interrupted code's
    jmp checksum_end_of_interrupt

# Gives contents to x87, SSE, debug registers, MSRs and CR8. Changes RAX, RCX, RDX, RSI, RDI.
checksum_give:
    mov rax, r12
    mov rdx, 0x9e3779b97f4a7c15
    lea rdi, [r15 + CPU_GIVEN]
    push rdi
    mov ecx, r14d                       # rounding of both units follows the iteration
    and ecx, 3
    mov esi, ecx
    shl esi, 10
    or esi, 0x037f                      # FCW: all exceptions masked
    mov [rdi], rsi                      # and FSW, FTW, FOP
    mov byte ptr [rdi + 4], 0xff        # FTW: all eight registers are in use
    mov qword ptr [rdi + 8], 0
    mov qword ptr [rdi + 16], 0
    shl ecx, 13
    or ecx, 0x1f80                      # MXCSR
    mov [rdi + 24], rcx
    add rdi, 32
    mov ecx, 8                          # x87 registers: a mantissa with its highest bit, a sign and exponent
1:  add rax, rdx
    mov [rdi], rax
    or byte ptr [rdi + 7], 0x80
    mov rsi, rax
    shr rsi, 50
    inc esi
    mov [rdi + 8], rsi
    add rdi, 16
    loop 1b
    mov ecx, 32                         # XMM0 to XMM15
2:  add rax, rdx
    stosq
    loop 2b
    pop rdi
    fxrstor [rdi]

    call checksum_address
    mov dr0, rax
    inc rax
    mov dr1, rax
    inc rax
    mov dr2, rax
    inc rax
    mov dr3, rax
    lea rsi, [rip + checksum_msrs]
3:  mov ecx, [rsi]
    jrcxz 4f
    inc rax
    mov rdx, rax
    shr rdx, 32
    wrmsr
    shl rdx, 32
    mov eax, eax
    or rax, rdx
    add rsi, 4
    jmp 3b
4:  mov eax, r14d
    and eax, 1                          # TPR: lets the timer's priority through
    mov cr8, rax
    ret

# Checks what `checksum_give` gave, but for XMM0, which is used on the way. Changes RAX, RCX, RDX, RSI, RDI, RBP.
checksum_find:
    lea rsi, [r15 + CPU_GIVEN]
    lea rdi, [r15 + CPU_FOUND]
    fxsave [rdi]
    mov ax, [rsi]                       # FCW
    cmp ax, [rdi]
    must_hold 0x10, e
    mov al, [rsi + 4]                   # FTW
    cmp al, [rdi + 4]
    must_hold 0x11, e
    mov eax, [rsi + 24]                 # MXCSR
    cmp eax, [rdi + 24]
    must_hold 0x12, e
    add rsi, 32
    add rdi, 32
    mov ecx, 8
1:  mov rax, [rsi]
    cmp rax, [rdi]
    must_hold 0x13, e
    mov ax, [rsi + 8]
    cmp ax, [rdi + 8]
    must_hold 0x14, e
    add rsi, 16
    add rdi, 16
    loop 1b
    add rsi, 16                         # XMM1 to XMM15
    add rdi, 16
    mov ecx, 30
    repe cmpsq
    must_hold 0x15, e

    call checksum_address
    mov rbp, rax
    mov rax, dr0
    cmp rax, rbp
    must_hold 0x20, e
    inc rbp
    mov rax, dr1
    cmp rax, rbp
    must_hold 0x21, e
    inc rbp
    mov rax, dr2
    cmp rax, rbp
    must_hold 0x22, e
    inc rbp
    mov rax, dr3
    cmp rax, rbp
    must_hold 0x23, e
    lea rsi, [rip + checksum_msrs]
2:  mov ecx, [rsi]
    jrcxz 3f
    inc rbp
    rdmsr
    shl rdx, 32
    or rax, rdx
    cmp rax, rbp
    must_hold 0x30, e
    add rsi, 4
    jmp 2b
3:  mov rax, cr8
    mov ecx, r14d
    and ecx, 1
    cmp rax, rcx
    must_hold 0x31, e
    mov ecx, APIC_LVT_TIMER
    call checksum_apic_read
    and eax, ~0x1000                    # delivery status
    cmp eax, 0x20000 | TICK_VECTOR
    must_hold 0x32, e
    ret

checksum_address:                       # RAX = an address of this iteration, canonical
    mov rax, r12
    shr rax, 18
    ret

    .balign 4
checksum_msrs:                          # FS, GS and kernel GS base, LSTAR, SYSENTER_ESP, SYSENTER_EIP
    .long 0xc0000100, 0xc0000101, 0xc0000102, 0xc0000082, 0x175, 0x176, 0

# Fills the buffer with numbers that follow from the iteration and the place, then checks each, and the sum of each page's
# first 16 bytes once more through XMM0.
checksum_buffer:
    mov rdi, [r15 + CPU_BUFFER]
    mov rcx, [rip + checksum_pages]
    shl rcx, 9
    mov rax, r12
    mov rdx, 0x9e3779b97f4a7c15
    push rcx
1:  mov [rdi], rax
    add rax, rdx
    add rdi, 8
    loop 1b
    pop rcx
    mov rdi, [r15 + CPU_BUFFER]
    mov rax, r12
2:  test edi, 0xfff
    jnz 3f
    movups xmm0, [rdi]
    movups [r15 + CPU_TEMP], xmm0
    mov rsi, [r15 + CPU_TEMP]
    add rsi, [r15 + CPU_TEMP + 8]
    lea rbp, [rax + rax]
    add rbp, rdx
    cmp rsi, rbp
    must_hold 0x41, e
3:  cmp [rdi], rax
    must_hold 0x40, e
    add rax, rdx
    add rdi, 8
    loop 2b
    ret

checksum_stack:                         # calls itself 16 deep, numbers pushed on the way down and checked on the way up
    mov ecx, 16
    mov rax, r12
1:  push rax
    ror rax, 7
    dec ecx
    jz 2f
    call 1b
2:  rol rax, 7
    pop rdx
    cmp rax, rdx
    must_hold 0x42, e
    ret

# The test device's scratch ports give back what was last written to them, a string's last unit included.
checksum_try_ports:
    lea rsi, [r15 + CPU_GIVEN + 160]    # bytes of this iteration
    mov eax, [r15 + CPU_NUMBER]         # each CPU has 8 ports of the 16
    lea edx, [rax * 8 + TEST_SCRATCH]
    mov ecx, 4
    rep outsw
    lea rdi, [r15 + CPU_TEMP]
    mov ecx, 4
    rep insw
    mov ax, [rsi - 2]
    mov ecx, 4
1:  sub rdi, 2
    cmp [rdi], ax
    must_hold 0x50, e
    loop 1b
    add edx, 4
    mov eax, r12d
    out dx, eax
    xor eax, eax
    in eax, dx
    cmp eax, r12d
    must_hold 0x51, e
    inc edx
    mov al, r14b
    out dx, al
    mov ecx, r12d                       # the dword again, its second byte exchanged
    mov ch, al
    dec edx
    in eax, dx
    cmp eax, ecx
    must_hold 0x52, e
    ret

# The test device's MMIO bytes: each width, across a page's end, and as a string.
checksum_try_mmio:
    mov esi, MMIO
    mov al, [rsi + 0x1234]
    cmp al, 0x26
    must_hold 0x60, e
    mov ax, [rsi + 0x203]
    cmp ax, 0x0601
    must_hold 0x61, e
    mov eax, [rsi + 0xffe]
    cmp eax, 0x1110f0f1
    must_hold 0x62, e
    mov rax, [rsi + 0xffc]
    mov rcx, 0x13121110f0f1f2f3
    cmp rax, rcx
    must_hold 0x63, e
    mov rax, [rsi + 0x10]
    mov rcx, 0x1716151413121110
    cmp rax, rcx
    must_hold 0x64, e
    mov [rsi + 0xffd], r12              # dropped
    add esi, 0x100
    lea rdi, [r15 + CPU_TEMP]
    mov ecx, 4
    rep movsb
    cmp dword ptr [r15 + CPU_TEMP], 0x02030001
    must_hold 0x65, e
    ret

checksum_broken:                        # EAX = the check
    cli
    mov ebx, eax
    failed checksum, "check "
    mov ecx, 2
    call checksum_put_hex
    say checksum, " on CPU "
    mov eax, [r15 + CPU_NUMBER]
    call checksum_put_decimal
    say checksum, ", iteration "
    mov eax, r14d
    call checksum_put_decimal
    say checksum, "\n"
    mov eax, ebx
    or eax, VERDICT_BAD
    jmp checksum_die

    .balign 8
checksum_pages:
    .quad 64
checksum_cpus:
    .quad 1
checksum_ports:
    .quad 1
checksum_mmio:
    .quad 1
    second_cpu checksum
    end_of_image checksum

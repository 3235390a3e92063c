# What the 64-bit guests share. `library g` makes one instance, its names prefixed with the guest's, because each guest is
# an image of its own. A routine keeps every register but RAX and the flags, unless it says otherwise.

# Ports of the test device (the crate's documentation defines them).
.set TEST_MSI_ADDRESS, 0x5e0
.set TEST_MSI_DATA, 0x5e4
.set TEST_VERDICT, 0x5e8
.set TEST_PROGRESS, 0x5ec
.set TEST_SCRATCH, 0x5f0
.set VERDICT_GOOD, 0x600d0000
.set VERDICT_BAD, 0xbad00000            # + number of the failed check
.set VERDICT_EXCEPTION, 0xbade0000      # + vector

# The workspace: from the first page behind the payload on.
.set WS_PML4, 0x0000
.set WS_PDPT, 0x1000
.set WS_STACK, 0x4000                   # first CPU's, growing down from here
.set WS_STACK_AP, 0x6000                # second CPU's
.set WS_IDT, 0x6000
.set WS_CLOCK, 0x7000                   # where KVM writes its clock
.set WS_FREE, 0x8000                    # the guest's own, to the end of the workspace
.set VECTORS, 64

# An interrupt handler gets RDI = address of its frame, may change it, and may use every general register.
.set FRAME_RAX, 14 * 8
.set FRAME_VECTOR, 15 * 8
.set FRAME_RIP, 17 * 8

# Local APIC registers; in x2APIC mode each is MSR 0x800 + offset / 16. Intel SDM volume 3, table 11-1.
.set APIC_ID, 0x20
.set APIC_EOI, 0xb0
.set APIC_SPURIOUS, 0xf0
.set APIC_ICR, 0x300
.set APIC_ICR_HIGH, 0x310
.set APIC_LVT_TIMER, 0x320
.set APIC_TIMER_INITIAL, 0x380
.set APIC_TIMER_CURRENT, 0x390
.set APIC_TIMER_DIVIDE, 0x3e0
.set SPURIOUS_VECTOR, 63

.macro say g, text:vararg               # prints a string
    call \g\()_say
    .asciz \text
.endm

.macro failed g, text:vararg            # counts and prints a failed check
    inc dword ptr [rip + \g\()_failures]
    call \g\()_say
    .ascii "FAILED: "
    .asciz \text
.endm

.macro word_of g, key:vararg            # RAX = number after `key` on the command line; CF if it is not there (RAX kept)
    call \g\()_word
    .asciz \key
.endm

.macro handle g, vector, routine        # calls `routine` on interrupts with `vector`
    lea rax, [rip + \routine]
    mov [rip + \g\()_handlers + 8 * \vector], rax
.endm

.macro library g

# Entry of every guest: own stack, page tables, GDT and IDT, so that nothing of the loader's is needed any more.
\g\()_start:
    cli
    cld
    lea rbx, [rip + \g\()_payload]
    lea rbp, [rip + \g\()_payload_end + 0xfff]
    and rbp, -4096
    mov [rip + \g\()_workspace], rbp
    mov [rip + \g\()_boot_params], rsi
    lea rsp, [rbp + WS_STACK]
    mov al, 0xff                        # the PICs, if there are: what firmware left in them would come as exceptions
    out 0x21, al
    out 0xa1, al

    lea rdi, [rbp + WS_PML4]
    mov ecx, 1024
    xor eax, eax
    rep stosq
    lea rax, [rbp + WS_PDPT + 3]
    mov [rbp + WS_PML4], rax
    lea rax, [rbx + DIRECTORIES + 3]
    mov [rbp + WS_PDPT], rax
    add rax, 0x1000
    mov [rbp + WS_PDPT + 8], rax
    add rax, 0x1000
    mov [rbp + WS_PDPT + 16], rax
    add rax, 0x1000
    mov [rbp + WS_PDPT + 24], rax

    lea rax, [rip + \g\()_gdt]
    mov [rip + \g\()_gdtr + 2], rax

    lea rdi, [rbp + WS_IDT]
    mov [rip + \g\()_idtr + 2], rdi
    lea rax, [rip + \g\()_stubs]
    mov ecx, VECTORS
1:  mov rdx, rax
    mov [rdi], dx
    mov dword ptr [rdi + 2], 0x8e000010 # interrupt gate through the code segment
    shr rdx, 16
    mov [rdi + 6], dx
    shr rdx, 16
    mov [rdi + 8], rdx
    add rax, 16
    add rdi, 16
    dec ecx
    jnz 1b
    handle \g, SPURIOUS_VECTOR, \g\()_nothing

    call \g\()_cpu_start
    mov rsi, [rip + \g\()_boot_params]
    test rsi, rsi
    jz 2f
    mov eax, [rsi + 0xc8]               # ext_cmd_line_ptr
    shl rax, 32
    mov ecx, [rsi + 0x228]              # cmd_line_ptr
    or rax, rcx
    mov [rip + \g\()_command_line], rax
2:  jmp \g\()_main

# Puts the calling CPU on the guest's page tables, GDT and IDT, and switches its SSE on. Changes RAX.
\g\()_cpu_start:
    mov rax, [rip + \g\()_workspace]
    mov cr3, rax
    lgdt [rip + \g\()_gdtr]
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    pop rax                             # return with a new CS
    push 0x10
    push rax
    lidt [rip + \g\()_idtr]
    mov rax, cr0
    and eax, ~0xc                       # not EM, not TS
    or eax, 0x22                        # MP, NE
    mov cr0, rax
    mov rax, cr4
    or eax, 0x600                       # OSFXSR, OSXMMEXCPT
    mov cr4, rax
    retfq

# --- Text on COM1 ---

\g\()_say:                              # prints the string that follows the call
    xchg rsi, [rsp]
    push rax
1:  lodsb
    test al, al
    jz 2f
    call \g\()_put
    jmp 1b
2:  pop rax
    xchg rsi, [rsp]
    ret

\g\()_put:                              # prints AL; a line feed as CR LF
    push rcx
    push rdx
    cmp al, 10
    jne 1f
    mov al, 13
    call 2f
    mov al, 10
1:  call 2f
    pop rdx
    pop rcx
    ret
2:  mov ah, al
    mov ecx, 1000                       # no longer than a while on a transmitter that never empties
    mov edx, 0x3fd                      # line status
3:  in al, dx
    test al, 0x20                       # transmitter holding register empty
    loopz 3b
    mov edx, 0x3f8
    mov al, ah
    out dx, al
    ret

\g\()_put_string:                       # prints up to RCX bytes from RSI, ending before a zero. Changes RSI, RCX.
    jrcxz 2f
1:  lodsb
    test al, al
    jz 2f
    call \g\()_put
    loop 1b
2:  ret

\g\()_put_decimal:                      # prints RAX
    push rdx
    push rcx
    push rbx
    mov ebx, 10
    xor ecx, ecx
1:  xor edx, edx
    div rbx
    push rdx
    inc ecx
    test rax, rax
    jnz 1b
2:  pop rax
    add al, '0'
    call \g\()_put
    loop 2b
    pop rbx
    pop rcx
    pop rdx
    ret

\g\()_put_hex:                          # prints 0x and the lowest CL digits of RAX
    push rcx
    push rdx
    mov rdx, rax
    say \g, "0x"
    mov ch, cl
    shl cl, 2
    ror rdx, cl                         # the first digit stands highest now
1:  rol rdx, 4
    mov al, dl
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe 2f
    add al, 'a' - '0' - 10
2:  call \g\()_put
    dec ch
    jnz 1b
    pop rdx
    pop rcx
    ret

# --- The command line ---

\g\()_word:                             # see `word_of`
    xchg rsi, [rsp]                     # RSI = the key
    push rdi
    push rbx
    push rcx
    push rdx
    push rax
    mov rdi, [rip + \g\()_command_line]
    test rdi, rdi
    jz 6f
1:  xor ecx, ecx                        # compare at the start of a word
2:  mov al, [rsi + rcx]
    test al, al
    jz 4f
    cmp al, [rdi + rcx]
    jne 3f
    inc ecx
    jmp 2b
3:  mov al, [rdi]                       # on to the next word
    test al, al
    jz 6f
    inc rdi
    cmp al, ' '
    jne 3b
    jmp 1b
4:  add rdi, rcx                        # found: its digits
    xor eax, eax
5:  movzx ecx, byte ptr [rdi]
    sub ecx, '0'
    cmp ecx, 9
    ja 7f
    imul rax, rax, 10
    add rax, rcx
    inc rdi
    jmp 5b
6:  mov ebx, 1                          # not there
    pop rax
    jmp 8f
7:  xor ebx, ebx
    pop rdx
8:  xchg rdi, rax
    xor eax, eax                        # behind the key the caller goes on
9:  lodsb
    test al, al
    jnz 9b
    xchg rdi, rax
    cmp ebx, 1
    cmc                                 # CF = (EBX == 1)
    pop rdx
    pop rcx
    pop rbx
    pop rdi
    xchg rsi, [rsp]
    ret

# --- Time ---

\g\()_deadline:                         # starts a time of 2^31 TSC cycles, in the order of a second
    push rdx
    rdtsc
    shl rdx, 32
    add rax, rdx
    mov edx, 1 << 31
    add rax, rdx
    mov [rip + \g\()_end_of_wait], rax
    pop rdx
    ret

\g\()_expired:                          # CF set once that time is over
    push rdx
    rdtsc
    shl rdx, 32
    add rdx, rax
    cmp [rip + \g\()_end_of_wait], rdx
    pop rdx
    ret

# --- Local APIC ---

\g\()_apic_start:                       # switches the calling CPU's on; EAX = 0 there is none, 1 xAPIC, 2 x2APIC mode
    push rcx
    push rdx
    mov eax, 1
    push rbx
    cpuid
    pop rbx
    xor eax, eax
    bt edx, 9                           # CPUID.1:EDX.APIC
    jnc 1f
    mov ecx, 0x1b                       # IA32_APIC_BASE
    rdmsr
    mov edx, eax
    xor eax, eax
    bt edx, 11                          # switched off for good
    jnc 1f
    inc eax
    bt edx, 10
    adc eax, 0
    mov [rip + \g\()_apic_mode], eax
    push rax
    mov ecx, APIC_SPURIOUS
    mov eax, 0x100 | SPURIOUS_VECTOR
    call \g\()_apic_write
    pop rax
1:  pop rdx
    pop rcx
    ret

\g\()_apic_read:                        # EAX = register ECX
    cmp dword ptr [rip + \g\()_apic_mode], 2
    je 1f
    mov eax, 0xfee00000
    mov eax, [rax + rcx]
    ret
1:  push rcx
    push rdx
    shr ecx, 4
    add ecx, 0x800
    rdmsr
    pop rdx
    pop rcx
    ret

\g\()_apic_write:                       # register ECX = EAX
    push rdx
    cmp dword ptr [rip + \g\()_apic_mode], 2
    je 1f
    mov edx, 0xfee00000
    mov [rdx + rcx], eax
    pop rdx
    ret
1:  push rcx
    shr ecx, 4
    add ecx, 0x800
    xor edx, edx
    wrmsr
    pop rcx
    pop rdx
    ret

\g\()_apic_id:                          # EAX = this CPU's APIC ID
    push rcx
    mov ecx, APIC_ID
    call \g\()_apic_read
    pop rcx
    cmp dword ptr [rip + \g\()_apic_mode], 2
    je 1f
    shr eax, 24
1:  ret

\g\()_apic_ipi:                         # sends the interrupt command EAX to the APIC ID in EDX
    push rcx
    cmp dword ptr [rip + \g\()_apic_mode], 2
    je 2f
    push rax
    mov ecx, APIC_ICR_HIGH
    mov eax, edx
    shl eax, 24
    call \g\()_apic_write
    pop rax
    mov ecx, APIC_ICR
    call \g\()_apic_write
1:  call \g\()_apic_read
    bt eax, 12                          # delivery pending
    jc 1b
    pop rcx
    ret
2:  mov ecx, 0x830                      # one 64-bit register in x2APIC mode
    wrmsr
    pop rcx
    ret

\g\()_end_of_interrupt:
    push rcx
    mov ecx, APIC_EOI
    xor eax, eax
    call \g\()_apic_write
    pop rcx
\g\()_nothing:
    ret

# --- Interrupts and exceptions ---

    .balign 16
\g\()_stubs:                            # 16 bytes a vector: its number and, where the CPU pushes none, an error code
    .set vector, 0
    .rept VECTORS
    .balign 16
    .if (vector > 31) || !((0x60227d00 >> vector) & 1)
    .byte 0x6a, 0                       # push 0
    .endif
    .byte 0x6a, vector                  # push vector
    jmp \g\()_interrupt
    .set vector, vector + 1
    .endr

\g\()_interrupt:
    .irp register, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    push \register
    .endr
    mov rdi, rsp
    mov ecx, [rdi + FRAME_VECTOR]
    lea rax, [rip + \g\()_handlers]
    mov rax, [rax + 8 * rcx]
    test rax, rax
    jz \g\()_unexpected
    call rax
    .irp register, r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax
    pop \register
    .endr
    add rsp, 16
    iretq

\g\()_unexpected:
    mov rbx, rdi
    failed \g, "unexpected interrupt or exception "
    mov eax, [rbx + FRAME_VECTOR]
    call \g\()_put_decimal
    say \g, " at payload + "
    mov rax, [rbx + FRAME_RIP]
    lea rcx, [rip + \g\()_payload]
    sub rax, rcx
    mov ecx, 8
    call \g\()_put_hex
    say \g, ", CR2 "
    mov rax, cr2
    mov ecx, 16
    call \g\()_put_hex
    say \g, "\n"
    mov eax, [rbx + FRAME_VECTOR]
    or eax, VERDICT_EXCEPTION

\g\()_die:                              # ends the guest as failed, with the verdict EAX, by the first means that is there
    cli
    mov edx, TEST_VERDICT
    out dx, eax
    mov edx, 0x501                      # isa-debug-exit: the VMM's exit status is 2 * 42 + 1
    mov al, 42
    out dx, al
    push 0                              # a triple fault
    push 0
    lidt [rsp]
    int3

\g\()_finish:                           # ends the guest as done
    cli
    mov edx, TEST_VERDICT
    mov eax, VERDICT_GOOD
    out dx, eax
1:  hlt
    jmp 1b

    .balign 16
\g\()_gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff            # 10 64-bit code
    .quad 0x00cf93000000ffff            # 18 data
\g\()_gdtr:
    .word 31
    .quad 0
\g\()_idtr:
    .word VECTORS * 16 - 1
    .quad 0
    .balign 8
\g\()_boot_params:
    .quad 0                             # zero if the guest was entered without
\g\()_command_line:
    .quad 0                             # zero if there is none
\g\()_workspace:
    .quad 0
\g\()_end_of_wait:
    .quad 0
\g\()_apic_mode:
    .long 0
\g\()_failures:
    .long 0
\g\()_handlers:
    .zero 8 * VECTORS
.endm

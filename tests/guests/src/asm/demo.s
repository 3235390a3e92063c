# The guest of `boot` without arguments: says what it was given, tries each kind of access and interrupt once, powers off.
# Its second part is demo_acpi.s, its third and last demo_io.s.

    image demo

demo_main:
    lea rsi, [rip + demo_uart_setup]
    mov ecx, 6
1:  lodsw
    movzx edx, al
    mov al, ah
    mov dh, 3
    out dx, al
    loop 1b
    say demo, "\nHello from the Keel demo guest, in 64-bit mode.\n\nCommand line   "
    mov rsi, [rip + demo_command_line]
    test rsi, rsi
    jz 1f
    cmp byte ptr [rsi], 0
    je 1f
    mov ecx, 2048
    call demo_put_string
    jmp 2f
1:  say demo, "(empty)"
2:  say demo, "\n"
    call demo_memory_map
    call demo_processor
    call demo_date
    call demo_kvm_clock
    call demo_acpi
    say demo, "\n"
    call demo_ports
    call demo_memory_mapped
    call demo_interrupts

    mov eax, [rip + demo_failures]
    test eax, eax
    jnz 1f
    say demo, "\nAll is well. Powering off through ACPI S5.\n"
    call demo_power_off
    failed demo, "power-off: still running\n"
1:  say demo, "\n"
    mov eax, [rip + demo_failures]
    call demo_put_decimal
    say demo, " checks failed.\n"
    mov eax, VERDICT_BAD
    jmp demo_die

demo_uart_setup:                        # COM1, port - 0x300 and value: 115200 baud, 8n1, no interrupts, FIFO, DTR and RTS
    .byte 0xfb, 0x83, 0xf8, 1, 0xf9, 0, 0xfb, 0x03, 0xfa, 7, 0xfc, 3

# --- What the guest was given ---

demo_memory_map:
    mov rsi, [rip + demo_boot_params]
    movzx ebx, byte ptr [rsi + 0x1e8]   # e820_entries
    test ebx, ebx
    jnz 1f
    failed demo, "memory map: empty\n"
    ret
1:  add rsi, 0x2d0                      # e820_table
    xor r12, r12                        # RAM in all
    say demo, "Memory map     "
2:  mov rax, [rsi]
    mov ecx, 12
    call demo_put_hex
    say demo, " - "
    mov rax, [rsi]
    add rax, [rsi + 8]
    dec rax
    call demo_put_hex
    mov eax, [rsi + 16]
    cmp eax, 1
    jne 3f
    add r12, [rsi + 8]
    say demo, " RAM"
    jmp 6f
3:  cmp eax, 2
    jne 4f
    say demo, " reserved"
    jmp 6f
4:  cmp eax, 3
    jne 5f
    say demo, " ACPI tables"
    jmp 6f
5:  say demo, " type "
    call demo_put_decimal
6:  say demo, "\n               "
    add rsi, 20
    dec ebx
    jnz 2b
    mov rax, r12
    shr rax, 20
    call demo_put_decimal
    say demo, " MiB of RAM\n"
    ret

demo_processor:
    say demo, "Processor      "
    xor eax, eax
    cpuid
    mov r12d, eax
    mov [rip + demo_text], ebx
    mov [rip + demo_text + 4], edx
    mov [rip + demo_text + 8], ecx
    call demo_put_text
    say demo, ", highest CPUID leaf "
    mov eax, r12d
    mov ecx, 2
    call demo_put_hex
    mov eax, 1
    cpuid
    bt ecx, 31                          # hypervisor present
    jnc 1f
    mov eax, 0x40000000
    cpuid
    mov r12d, eax
    mov [rip + demo_text], ebx
    mov [rip + demo_text + 4], ecx
    mov [rip + demo_text + 8], edx
    say demo, "\nHypervisor     "
    call demo_put_text
    say demo, ", highest leaf "
    mov eax, r12d
    mov ecx, 8
    call demo_put_hex
    say demo, "\n"
    ret
1:  say demo, "\nHypervisor     none that says so\n"
    ret

demo_put_text:                          # the 12 bytes at demo_text
    lea rsi, [rip + demo_text]
    mov ecx, 12
    jmp demo_put_string

demo_cmos:                              # EAX = register AL of the RTC and CMOS
    out 0x70, al
    in al, 0x71
    movzx eax, al
    ret

demo_date:                              # MC146818: registers 0, 2, 4, 7, 8, 9, A, B; the century in 32h, as in the PC/AT
    say demo, "Date and time  "
    mov al, 13
    call demo_cmos
    cmp al, 0xff
    jne 1f
    say demo, "no RTC\n"
    ret
1:  call demo_read_date                 # twice the same: not torn by the next second
    mov r13, rbx
    call demo_read_date
    cmp rbx, r13
    jne 1b
    mov al, 11                          # register B
    call demo_cmos
    mov r12d, eax
    shl rbx, 8
    lea rsi, [rip + demo_date_marks]
2:  rol rbx, 8
    mov al, bl
    cmp byte ptr [rsi], ':'             # behind hours and minutes, whose bit 7 is no digit
    jne 3f
    and al, 0x7f
3:  call demo_put_clock
    lodsb
    test al, al
    jz 2b
    call demo_put                       # AL is still the mark
    cmp al, ','
    jne 2b
    test r12b, 2                        # 24-hour mode; without it the hours' bit 7 says afternoon
    jnz 5f
    bt r13, 23
    jc 4f
    say demo, " am,"
    jmp 5f
4:  say demo, " pm,"
5:  say demo, " says the RTC\n"
    ret

demo_date_registers:                    # century, year, month, day, hours, minutes, seconds
    .byte 0x32, 9, 8, 7, 4, 2, 0
demo_date_marks:                        # what is printed behind each
    .byte 0, '-', '-', ' ', ':', ':', ','

demo_read_date:                         # RBX = the seven registers, seconds lowest, outside of the RTC's update. Changes RCX, RSI.
    mov ecx, 2000                       # longer than an update takes
1:  mov al, 10                          # register A
    call demo_cmos
    test al, 0x80                       # update in progress
    loopnz 1b
    jz 2f
    failed demo, "RTC: its update does not end\n"
2:  lea rsi, [rip + demo_date_registers]
    xor ebx, ebx
    mov ecx, 7
3:  lodsb
    call demo_cmos
    shl rbx, 8
    mov bl, al
    loop 3b
    ret

demo_put_clock:                         # the RTC's number AL in two digits; R12 = register B. Changes RCX.
    test r12b, 4                        # binary; without it packed decimal
    jz 1f
    mov ah, 0
    mov cl, 10
    div cl                              # AL = tens, AH = units
    shl al, 4
    or al, ah
1:  mov ecx, eax
    shr al, 4
    add al, '0'
    call demo_put
    mov al, cl
    and al, 15
    add al, '0'
    jmp demo_put

# kvmclock: KVM keeps a `pvclock_vcpu_time_info` up to date at an address the guest names (Linux, Documentation/virt/kvm/x86/msr.rst).
demo_kvm_clock:
    mov eax, 0x40000000
    cpuid
    cmp ebx, 0x4b4d564b                 # "KVMK"
    jne 1f
    mov eax, 0x40000001
    cpuid
    bt eax, 3                           # KVM_FEATURE_CLOCKSOURCE2
    jc 2f
1:  say demo, "kvmclock       none\n"
    ret
2:  mov rbp, [rip + demo_workspace]
    add rbp, WS_CLOCK
    mov qword ptr [rbp], 0
    mov eax, ebp
    or eax, 1
    mov rdx, rbp
    shr rdx, 32
    mov ecx, 0x4b564d01                 # MSR_KVM_SYSTEM_TIME_NEW
    wrmsr
    lea rax, [rbp + 64]
    mov qword ptr [rax], 0
    mov rdx, rax
    shr rdx, 32
    mov ecx, 0x4b564d00                 # MSR_KVM_WALL_CLOCK_NEW: time of day when the system time was 0
    wrmsr
    say demo, "kvmclock       "
    call demo_read_kvm_clock
    mov r12, rax
    xor edx, edx
    mov ecx, 1000000
    div rcx
    call demo_put_decimal
    say demo, " ms since the machine started, which was at Unix time "
    mov eax, [rbp + 68]
    call demo_put_decimal
    call demo_read_kvm_clock
    cmp rax, r12
    ja 3f
    say demo, "\n"
    failed demo, "kvmclock: does not advance"
3:  say demo, "\n"
    xor eax, eax
    xor edx, edx
    mov ecx, 0x4b564d01
    wrmsr
    ret

demo_read_kvm_clock:                    # RAX = nanoseconds; RBP = the structure. Changes RBX, RCX, RDX.
    mov ebx, [rbp]                      # an odd version while KVM writes
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [rbp + 8]                  # tsc_timestamp
    movsx ecx, byte ptr [rbp + 28]      # tsc_shift
    test ecx, ecx
    js 1f
    shl rax, cl
    jmp 2f
1:  neg ecx
    shr rax, cl
2:  mov ecx, [rbp + 24]                 # tsc_to_system_mul
    mul rcx
    shrd rax, rdx, 32
    add rax, [rbp + 16]                 # system_time
    cmp ebx, [rbp]
    jne demo_read_kvm_clock
    test bl, 1
    jnz demo_read_kvm_clock
    ret

demo_text:
    .zero 16

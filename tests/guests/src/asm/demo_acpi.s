# The demo's second part: finds its way through the ACPI tables, and powers off by them.
# RSDP, XSDT, FADT, DSDT: ACPI 6.5, sections 5.2.5 to 5.2.11.

demo_acpi:
    mov rax, [rip + demo_boot_params]
    mov rsi, [rax + 0x70]               # acpi_rsdp_addr
    test rsi, rsi
    jnz 3f
    mov esi, 0xe0000                    # not told: where a PC's firmware has it
    mov rax, 0x2052545020445352         # "RSD PTR "
1:  cmp [rsi], rax
    je 3f
    add esi, 16
    cmp esi, 0x100000
    jne 1b
2:  failed demo, "ACPI: no RSDP\n"
    ret
3:  mov rax, 0x2052545020445352
    cmp [rsi], rax
    jne 2b
    mov ecx, 20
    cmp byte ptr [rsi + 15], 2          # revision
    jb 4f
    mov ecx, 36
4:  call demo_sum
    jnz 2b
    mov r12d, 4                         # RSDT: addresses of 4 bytes
    mov ebx, [rsi + 16]
    cmp ecx, 36
    jne 5f
    mov r12d, 8                         # XSDT
    mov rbx, [rsi + 24]
5:  mov rsi, rbx
    call demo_check_table
    say demo, "ACPI tables    "
    mov ebp, [rbx + 4]
    add rbp, rbx                        # their list's end
    lea r13, [rbx + 36]
6:  cmp r13, rbp
    jae 8f
    mov esi, [r13]
    cmp r12d, 4
    je 7f
    mov rsi, [r13]
7:  call demo_check_table
    cmp dword ptr [rsi], 0x50434146     # "FACP"
    jne 1f
    mov [rip + demo_fadt], rsi
1:  cmp dword ptr [rsi], 0x43495041     # "APIC"
    jne 1f
    call demo_interrupt_override
1:  mov ecx, 4
    push rsi
    call demo_put_string
    pop rsi
    say demo, " "
    add r13, r12
    jmp 6b
8:  mov rbx, [rip + demo_fadt]
    test rbx, rbx
    jnz 9f
    say demo, "\n"
    failed demo, "ACPI: no FADT\n"
    ret
9:  mov esi, [rbx + 40]                 # DSDT
    cmp dword ptr [rbx + 4], 148
    jb 1f
    mov rax, [rbx + 140]                # X_DSDT
    test rax, rax
    cmovnz rsi, rax
1:  call demo_check_table
    mov [rip + demo_dsdt], rsi
    say demo, "DSDT\nPM timer       "
    mov edx, [rbx + 76]                 # PM_TMR_BLK
    test edx, edx
    jnz 2f
    say demo, "none\n"
    ret
2:  say demo, "port "
    mov eax, edx
    mov ecx, 4
    call demo_put_hex
    in eax, dx
    mov r12d, eax
    call demo_deadline
3:  in eax, dx
    sub eax, r12d
    and eax, 0xffffff                   # 24 bits at least
    cmp eax, 358                        # 100 us at 3.579545 MHz
    jae 4f
    call demo_expired
    jnc 3b
    say demo, "\n"
    failed demo, "PM timer: does not advance\n"
    ret
4:  say demo, ", advancing\n"
    ret

demo_sum:                               # ZF set if the RCX bytes at RSI add up to 0
    push rcx
    push rsi
    xor edx, edx
1:  lodsb
    add dl, al
    loop 1b
    pop rsi
    pop rcx
    test dl, dl
    ret

# MADT (ACPI 6.5, section 5.2.12): which I/O APIC pin the timer's ISA interrupt 0 is wired to, pin 0 if it does not say.
demo_interrupt_override:
    mov dword ptr [rip + demo_pit_pin], 0
    mov ecx, [rsi + 4]
    add rcx, rsi
    lea rax, [rsi + 44]
1:  cmp rax, rcx
    jae 3f
    cmp word ptr [rax + 2], 0           # bus ISA, source 0
    jne 2f
    cmp byte ptr [rax], 2               # interrupt source override
    jne 2f
    mov edx, [rax + 4]
    mov [rip + demo_pit_pin], edx
2:  movzx edx, byte ptr [rax + 1]
    add rax, rdx
    test edx, edx
    jnz 1b
3:  ret

demo_check_table:                       # the table at RSI: a length that can be and a right checksum
    mov ecx, [rsi + 4]
    cmp ecx, 36
    jb 1f
    cmp ecx, 0x20000
    ja 1f
    call demo_sum
    jnz 1f
    ret
1:  failed demo, "ACPI: bad length or checksum of table "
    push rsi
    mov ecx, 4
    call demo_put_string
    pop rsi
    say demo, "\n"
    ret

# S5: the sleep type is the first element of the package that the DSDT names _S5_.
demo_power_off:
    mov rsi, [rip + demo_dsdt]
    test rsi, rsi
    jz 8f
    mov ecx, [rsi + 4]
    sub ecx, 36 + 8
    jbe 8f
    add rsi, 36
1:  cmp dword ptr [rsi], 0x5f35535f     # "_S5_"
    jne 2f
    cmp byte ptr [rsi + 4], 0x12        # PackageOp
    je 3f
2:  inc rsi
    loop 1b
8:  failed demo, "power-off: no _S5 in the DSDT\n"
    ret
3:  movzx eax, byte ptr [rsi + 5]       # PkgLength: its two highest bits count the bytes that follow
    shr eax, 6
    movzx ecx, byte ptr [rsi + rax + 7] # behind NumElements
    cmp ecx, 1                          # ZeroOp, OneOp
    jbe 4f
    cmp ecx, 0x0a                       # BytePrefix
    jne 8b
    movzx ecx, byte ptr [rsi + rax + 8]
4:  mov rbx, [rip + demo_fadt]
    bt dword ptr [rbx + 112], 20        # HW_REDUCED_ACPI: the sleep control register
    jc 7f
    mov edx, [rbx + 48]                 # SMI_CMD
    test edx, edx
    jz 5f
    mov al, [rbx + 52]                  # ACPI_ENABLE
    test al, al
    jz 5f
    out dx, al
5:  mov edx, [rbx + 64]                 # PM1a_CNT_BLK
    cmp dword ptr [rbx + 4], 184
    jb 6f
    mov eax, [rbx + 176]                # X_PM1a_CNT_BLK's address
    cmp byte ptr [rbx + 172], 1         # in port space
    jne 6f
    test eax, eax
    cmovnz edx, eax
6:  in ax, dx
    and ax, 0xc3ff
    shl ecx, 10                         # SLP_TYP
    or eax, ecx
    out dx, ax                          # the type first, then the enable bit: some hardware wants two writes
    or ax, 0x2000                       # SLP_EN
    out dx, ax
    jmp 9f
7:  mov rdx, [rbx + 248]                # SLEEP_CONTROL_REG
    mov eax, ecx
    shl eax, 2
    or eax, 0x20
    cmp byte ptr [rbx + 244], 1
    jne 1f
    out dx, al
    jmp 9f
1:  mov [rdx], al
9:  call demo_deadline                  # the VMM may need a moment
1:  pause
    call demo_expired
    jnc 1b
    ret

    .balign 8
demo_fadt:
    .quad 0
demo_dsdt:
    .quad 0
demo_pit_pin:
    .long 2                             # where there is no MADT: as on most PCs

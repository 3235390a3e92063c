# The demo's third part: ports, memory-mapped I/O, interrupts.

.set TIMER_VECTOR, 48
.set PIT_VECTOR, 49
.set MSI_VECTOR, 50
.set IOAPIC, 0xfec00000
.set HPET, 0xfed00000
.set NOBODY, 0x5d8                      # a port nobody has
.set NOTHING, 0xfedf0000                # 64 KiB of physical addresses where a PC has nothing

# --- Port I/O ---

demo_ports:
    say demo, "Port I/O       bytes "
    mov edx, 0x3ff                      # the UART's scratch register
    mov al, 0x5a
    out dx, al
    in al, dx
    cmp al, 0x5a
    je 1f
    say demo, "\n"
    failed demo, "port 0x3ff: not what was written\n"
1:  lea rdi, [rip + demo_text]          # a string of four from the same register, and nothing behind it
    mov dword ptr [rdi + 4], 0x77777777
    mov ecx, 4
    rep insb
    cmp dword ptr [rip + demo_text], 0x5a5a5a5a
    jne 2f
    cmp dword ptr [rip + demo_text + 4], 0x77777777
    je 3f
2:  say demo, "\n"
    failed demo, "port 0x3ff: rep insb\n"
3:  say demo, "strings words "
    mov edx, NOBODY                     # an unclaimed port reads all ones in each width
    mov ax, 0x1234
    out dx, ax
    in ax, dx
    cmp ax, 0xffff
    jne 4f
    in eax, dx
    cmp eax, 0xffffffff
    jne 4f
    lea rdi, [rip + demo_text]
    mov ecx, 2
    rep insw
    cmp dword ptr [rip + demo_text], 0xffffffff
    jne 4f
    cmp dword ptr [rip + demo_text + 4], 0x77777777
    je 5f
4:  say demo, "\n"
    failed demo, "an unclaimed port: not all ones\n"
5:  say demo, "doublewords"
    mov edx, 0xcf8                      # PCI configuration address
    mov eax, 0x80000000
    out dx, eax
    in eax, dx
    cmp eax, 0x80000000
    jne 6f
    say demo, ", a PCI bus"
6:  mov edx, 0xe9                       # the debug console answers with its port number
    in al, dx
    cmp al, 0xe9
    jne 7f
    lea rsi, [rip + demo_console_line]
    mov ecx, 46
    rep outsb
    say demo, ", a debug console"
7:  say demo, "\n"
    ret

demo_console_line:
    .ascii "Hello debug console, from the Keel demo guest\n"

# --- Memory-mapped I/O ---

demo_ioapic_read:                       # EAX = I/O APIC register EAX
    mov ecx, IOAPIC
    mov [rcx], eax
    mov eax, [rcx + 0x10]
    ret

demo_ioapic_write:                      # I/O APIC register EAX = EDX
    mov ecx, IOAPIC
    mov [rcx], eax
    mov [rcx + 0x10], edx
    ret

demo_memory_mapped:
    say demo, "Memory-mapped  "
    mov eax, 1                          # I/O APIC version
    call demo_ioapic_read
    cmp eax, 0xffffffff
    jne 1f
    say demo, "no I/O APIC"
    jmp 3f
1:  mov dword ptr [rip + demo_has_ioapic], 1
    mov ebx, eax
    say demo, "I/O APIC version "
    movzx eax, bl
    mov ecx, 2
    call demo_put_hex
    say demo, " with "
    shr ebx, 16
    movzx eax, bl
    inc eax
    call demo_put_decimal
    say demo, " pins"
    movzx eax, bl                       # the last pin's redirection entry, kept masked
    lea ebx, [rax + rax + 0x10]
    mov eax, ebx
    mov edx, 0x1003f
    call demo_ioapic_write
    lea eax, [rbx + 1]
    mov edx, 0xa5000000
    call demo_ioapic_write
    mov eax, ebx
    call demo_ioapic_read
    cmp eax, 0x1003f
    jne 2f
    lea eax, [rbx + 1]
    call demo_ioapic_read
    shr eax, 24                         # the bits below need not be kept
    cmp eax, 0xa5
    je 3f
2:  say demo, "\n"
    failed demo, "I/O APIC: a redirection entry is not what was written\n"
3:  mov edx, HPET
    mov eax, [rdx]
    cmp eax, 0xffffffff
    je 4f
    say demo, ", an HPET"
    jmp 5f
4:  say demo, ", no HPET"
5:  mov esi, NOTHING                    # unclaimed: writes vanish, reads are all ones in each width, over a page's end too
    mov qword ptr [rsi], 0
    mov word ptr [rsi + 0x1003], 0
    mov al, [rsi]
    cmp al, 0xff
    jne 6f
    mov ax, [rsi + 3]
    cmp ax, 0xffff
    jne 6f
    mov eax, [rsi + 5]
    cmp eax, 0xffffffff
    jne 6f
    mov rax, [rsi + 0xffc]
    cmp rax, -1
    jne 6f
    say demo, ", all ones where there is nothing\n"
    ret
6:  say demo, "\n"
    failed demo, "an unclaimed address: not all ones\n"
    ret

# --- Interrupts ---

demo_tick:
    inc dword ptr [rip + demo_ticks]
    jmp demo_end_of_interrupt

# Waits until R12D interrupts were counted; CF set if they did not come. The first is awaited running, because HLT would
# not end without it; the others in HLT.
demo_wait_ticks:
    call demo_deadline
1:  sti
    pause
    cli
    cmp dword ptr [rip + demo_ticks], 0
    jne 2f
    call demo_expired
    jnc 1b
    ret
2:  cmp dword ptr [rip + demo_ticks], r12d
    jae 3f
    sti                                 # nothing comes between STI and HLT
    hlt
    cli
    jmp 2b
3:  clc
    ret

demo_interrupts:
    handle demo, TIMER_VECTOR, demo_tick
    handle demo, PIT_VECTOR, demo_tick
    handle demo, MSI_VECTOR, demo_tick
    say demo, "Interrupts     "
    call demo_apic_start
    test eax, eax
    jnz 1f
    say demo, "no local APIC\n"
    ret
1:  cmp eax, 1
    jne 2f
    call demo_local_timer
    mov eax, 1                          # and again in x2APIC mode
    cpuid
    bt ecx, 21
    jnc 3f
    mov ecx, 0x1b
    rdmsr
    or eax, 0x400
    wrmsr
    call demo_apic_start
2:  call demo_local_timer
3:  call demo_pit
    call demo_msi
    say demo, "\n"
    ret

demo_local_timer:
    mov dword ptr [rip + demo_ticks], 0
    mov ecx, APIC_TIMER_DIVIDE
    mov eax, 3                          # by 16
    call demo_apic_write
    mov ecx, APIC_LVT_TIMER
    mov eax, 0x20000 | TIMER_VECTOR     # periodic
    call demo_apic_write
    mov ecx, APIC_TIMER_INITIAL
    mov eax, 312500                     # 5 ms of KVM's 1 GHz
    call demo_apic_write
    mov r12d, 5
    call demo_wait_ticks
    jc 1f
    say demo, "5 ticks of the "
    call demo_stop_timer
    cmp dword ptr [rip + demo_apic_mode], 2
    je 2f
    say demo, "xAPIC timer, "
    ret
2:  say demo, "x2APIC timer, "
    ret
1:  call demo_stop_timer
    say demo, "\n"
    failed demo, "local APIC timer: no interrupt\n"
    ret

demo_stop_timer:
    mov ecx, APIC_TIMER_INITIAL
    xor eax, eax
    call demo_apic_write
    mov ecx, APIC_LVT_TIMER
    mov eax, 0x10000 | TIMER_VECTOR     # masked
    jmp demo_apic_write

demo_pit:                               # channel 0 at 100 Hz, through the I/O APIC
    cmp dword ptr [rip + demo_has_ioapic], 0
    je 1f
    mov al, 0xe2                        # read-back: the status of channel 0
    out 0x43, al
    in al, 0x40
    cmp al, 0xff
    jne 2f
1:  say demo, "no PIT, "
    ret
2:  mov dword ptr [rip + demo_ticks], 0
    call demo_apic_id
    mov edx, eax
    shl edx, 24
    mov eax, [rip + demo_pit_pin]
    lea ebx, [rax + rax + 0x10]         # its redirection entry
    lea eax, [rbx + 1]
    call demo_ioapic_write
    mov edx, PIT_VECTOR                 # fixed, physical, active high, edge, not masked
    mov eax, ebx
    call demo_ioapic_write
    mov al, 0x34                        # channel 0, both bytes, rate generator
    out 0x43, al
    mov al, 0x9c                        # 11932 of 1.193182 MHz
    out 0x40, al
    mov al, 0x2e
    out 0x40, al
    mov r12d, 3
    call demo_wait_ticks
    pushfq
    mov edx, 0x10000 | PIT_VECTOR
    mov eax, ebx
    call demo_ioapic_write
    mov al, 0x30                        # one shot, never started: quiet
    out 0x43, al
    popfq
    jc 3f
    say demo, "3 of the PIT, "
    ret
3:  say demo, "\n"
    failed demo, "PIT: no interrupt through the I/O APIC\n"
    ret

demo_msi:
    mov edx, TEST_MSI_ADDRESS
    in eax, dx
    cmp eax, 0xffffffff
    jne 1f
    say demo, "no MSI test device"
    ret
1:  mov dword ptr [rip + demo_ticks], 0
    call demo_apic_id
    shl eax, 12
    or eax, 0xfee00000
    out dx, eax
    mov edx, TEST_MSI_DATA
    mov eax, MSI_VECTOR
    out dx, eax
    mov r12d, 1
    call demo_wait_ticks
    jc 2f
    say demo, "an MSI"
    ret
2:  say demo, "\n"
    failed demo, "MSI: no interrupt\n"
    ret

    .balign 4
demo_ticks:
    .long 0
demo_has_ioapic:
    .long 0
    end_of_image demo

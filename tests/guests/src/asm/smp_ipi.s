# Two CPUs throw an interrupt back and forth `count=` times. A lost one leaves both in HLT for ever.

.set PING_VECTOR, 48                    # to the second CPU
.set PONG_VECTOR, 49                    # to the first

    image smp_ipi

smp_ipi_main:
    mov eax, 1000
    word_of smp_ipi, "count="
    mov r13, rax
    call smp_ipi_apic_start
    test eax, eax
    mov eax, VERDICT_BAD + 1            # no local APIC
    jz smp_ipi_die
    call smp_ipi_apic_id
    mov [rip + smp_ipi_first_id], eax
    handle smp_ipi, PING_VECTOR, smp_ipi_ping
    handle smp_ipi, PONG_VECTOR, smp_ipi_pong
    call smp_ipi_start_second_cpu
    mov eax, VERDICT_BAD + 2            # the second CPU did not come
    jc smp_ipi_die

    xor r14d, r14d
1:  cmp r14, r13
    jae 3f
    inc r14
    mov edx, [rip + smp_ipi_second_id]
    mov eax, 0x4000 | PING_VECTOR       # fixed, assert
    call smp_ipi_apic_ipi
2:  cli                                 # nothing comes between STI and HLT
    cmp [rip + smp_ipi_pongs], r14
    jae 1b
    sti
    hlt
    jmp 2b

3:  mov eax, r14d
    and eax, 0xffffff
    mov edx, TEST_PROGRESS
    out dx, eax
    cmp [rip + smp_ipi_pings], r13
    mov eax, VERDICT_BAD + 3            # more or fewer than were sent
    jne smp_ipi_die
    cmp [rip + smp_ipi_pongs], r13
    jne smp_ipi_die
    jmp smp_ipi_finish

smp_ipi_second_main:
    sti
    hlt
    jmp smp_ipi_second_main

smp_ipi_ping:
    inc qword ptr [rip + smp_ipi_pings]
    call smp_ipi_end_of_interrupt
    mov edx, [rip + smp_ipi_first_id]
    mov eax, 0x4000 | PONG_VECTOR
    jmp smp_ipi_apic_ipi

smp_ipi_pong:
    inc qword ptr [rip + smp_ipi_pongs]
    jmp smp_ipi_end_of_interrupt

    .balign 8
smp_ipi_pings:
    .quad 0
smp_ipi_pongs:
    .quad 0
smp_ipi_first_id:
    .long 0
    second_cpu smp_ipi
    end_of_image smp_ipi

# Tiny flat code whose bytes mean the same in real mode and in 64-bit mode: no image, no tables, everything from registers.
# The address-size prefix makes LOOP, strings and operands use ECX, ESI, EDI in both; an operand without a prefix is a
# word in real mode and a doubleword in 64-bit mode.

.macro raw g
    .globl keel_raw_\g
keel_raw_\g:
.endm

.macro end_of_raw g
    .globl keel_raw_\g\()_end
keel_raw_\g\()_end:
.endm

    raw spin
1:  pause
    jmp 1b
    end_of_raw spin

    raw halt
1:  hlt
    jmp 1b
    end_of_raw halt

    raw port_out
1:  out dx, al
    .byte 0x67
    loop 1b
    hlt
    end_of_raw port_out

    raw port_in
1:  in al, dx
    .byte 0x67
    loop 1b
    hlt
    end_of_raw port_in

    raw string_out
1:  mov ecx, ebx
    mov esi, edi
    .byte 0x67
    rep outsb
    dec ebp
    jnz 1b
    hlt
    end_of_raw string_out

    raw string_in
1:  mov ecx, ebx
    mov edi, esi
    .byte 0x67
    rep insb
    dec ebp
    jnz 1b
    hlt
    end_of_raw string_in

    raw string_in_words                 # 0x6d: words in real mode, doublewords in 64-bit mode
1:  mov ecx, ebx
    mov edi, esi
    .byte 0x67
    rep insd
    dec ebp
    jnz 1b
    hlt
    end_of_raw string_in_words

    raw mmio_store
1:  mov [edi], al
    .byte 0x67
    loop 1b
    hlt
    end_of_raw mmio_store

    raw mmio_load
1:  mov al, [edi]
    .byte 0x67
    loop 1b
    hlt
    end_of_raw mmio_load

# The shape of a Linux bzImage (Linux, Documentation/arch/x86/boot.rst): a first sector with the setup header, setup
# sectors with 16-bit code, then the payload. A boot loader that enters in 64-bit mode starts at payload + 0x200 and
# never runs the 16-bit code; one that enters in real mode (GRUB, QEMU's -kernel) starts at `_setup`.
#
# `image g` opens the guest `g`: header, setup, payload entry. `end_of_image g` closes it.

.set PAYLOAD_ADDRESS, 0x100000          # where the 16-bit entry finds the payload, and what pref_address asks for
.set SETUP_SECTORS, 2
.set HEADER_END, 0x26c
.set DIRECTORIES, 0x1000                # where in the payload its page directories are
.set WORKSPACE, 0x20000                 # length of the workspace behind the payload, part of init_size

.macro image g
    .balign 512
    .globl keel_guest_\g
keel_guest_\g:
\g\()_image:
    .zero 0x1f1                         # no boot sector: the image is not started from a floppy disk
    .byte SETUP_SECTORS                 # 1f1 setup_sects
    .word 0                             # 1f2 root_flags
    .long (\g\()_payload_end - \g\()_payload) / 16  # 1f4 syssize
    .word 0, 0xffff, 0                  # 1f8 ram_size, 1fa vid_mode (as it is), 1fc root_dev
    .word 0xaa55                        # 1fe boot_flag
    .byte 0xeb, \g\()_header_end - 1f    # 200 jump to the 16-bit code, at the header's end: loaders learn that from it
1:  .ascii "HdrS"                       # 202 header
    .word 0x020f                        # 206 version 2.15
    .long 0                             # 208 realmode_swtch
    .word 0                             # 20c start_sys_seg
    .word \g\()_version - \g\()_image - 0x200  # 20e kernel_version
    .byte 0                             # 210 type_of_loader: written by the loader
    .byte 1                             # 211 loadflags: LOADED_HIGH
    .word 0                             # 212 setup_move_size
    .long PAYLOAD_ADDRESS               # 214 code32_start
    .long 0, 0                          # 218 ramdisk_image, 21c ramdisk_size
    .long 0                             # 220 bootsect_kludge
    .word 0                             # 224 heap_end_ptr
    .byte 0, 0                          # 226 ext_loader_ver, 227 ext_loader_type
    .long 0                             # 228 cmd_line_ptr
    .long 0x7fffffff                    # 22c initrd_addr_max
    .long 0x1000                        # 230 kernel_alignment: the page tables in the payload need no more
    .byte 1, 12                         # 234 relocatable_kernel, 235 min_alignment, a power of two
    .word 0x0001                        # 236 xloadflags: XLF_KERNEL_64
    .long 2047                          # 238 cmdline_size
    .long 0                             # 23c hardware_subarch: a PC
    .quad 0                             # 240 hardware_subarch_data
    .long 0, 0                          # 248 payload_offset, 24c payload_length: nothing compressed inside
    .quad 0                             # 250 setup_data
    .quad PAYLOAD_ADDRESS               # 258 pref_address
    .long (\g\()_payload_end - \g\()_payload) + WORKSPACE  # 260 init_size
    .long 0                             # 264 handover_offset: no EFI
    .long 0                             # 268 kernel_info_offset
    # Entered with CS = the image's segment + 0x20, IP = 0, DS = ES = FS = GS = SS = the image's segment, SP at the heap's end,
    # interrupts off (boot.rst, "Running the kernel"). Makes what a 64-bit loader would have made.
    .code16
\g\()_header_end:
    cld
    xor ebx, ebx                        # EBX = linear address of the image, kept to the end
    mov bx, ds
    shl ebx, 4

    mov di, 0x3000                      # the boot_params page, in the 64 KiB a loader gives this code
    mov cx, 1024
    xor eax, eax
    rep stosd
    mov si, 0x1f1                       # the header with what the loader wrote into it
    mov di, 0x31f1
    mov cx, HEADER_END - 0x1f1
    rep movsb

    mov si, 0x32d0                      # e820_table, through INT 15h AX=E820h
    xor ebp, ebp                        # its continuation value
1:  mov di, si
    mov eax, 0xe820
    mov edx, 0x534d4150                 # "SMAP"
    mov ecx, 20
    xchg ebx, ebp
    int 0x15
    xchg ebx, ebp
    jc 2f
    cmp eax, 0x534d4150
    jne 2f
    add si, 20
    inc byte ptr [0x31e8]               # e820_entries
    cmp byte ptr [0x31e8], 128
    je 2f
    test ebp, ebp
    jnz 1b
2:
    in al, 0x92                         # address line 20, where the firmware left it off
    or al, 2
    out 0x92, al

    mov word ptr [0x4000], 23           # GDTR, in the same scratch memory
    lea eax, [ebx + 0x4010]
    mov dword ptr [0x4002], eax
    mov si, 0x4010                      # the GDT: null, then 0x08 unused, then 0x10 64-bit code
    mov dword ptr [si], 0
    mov dword ptr [si + 4], 0
    mov dword ptr [si + 8], 0
    mov dword ptr [si + 12], 0
    mov dword ptr [si + 16], 0x0000ffff
    mov dword ptr [si + 20], 0x00af9b00

    # The payload's own page directories map the low 4 GiB; give them a PML4 and a PDPT.
    mov di, 0x5000
    mov cx, 2048
    xor eax, eax
    rep stosd
    lea eax, [ebx + 0x6000 + 3]
    mov dword ptr [0x5000], eax
    mov eax, PAYLOAD_ADDRESS + DIRECTORIES + 3
    mov si, 0x6000
3:  mov dword ptr [si], eax
    add si, 8
    add eax, 0x1000
    cmp si, 0x6020
    jne 3b

    lgdt [0x4000]
    lea esi, [ebx + 0x3000]             # what the 64-bit entry wants in RSI
    mov eax, cr4
    or eax, 0x20                        # PAE
    mov cr4, eax
    lea eax, [ebx + 0x5000]
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER
    rdmsr
    or eax, 0x100                       # LME
    wrmsr
    mov eax, cr0
    or eax, 0x80000001                  # PG and PE at once: straight into long mode
    mov cr0, eax
    .byte 0x66, 0xea                    # jmp 0x10:payload + 0x200
    .long PAYLOAD_ADDRESS + 0x200
    .word 0x10
    .code64
\g\()_version:
    .asciz "keel-guests \g"
    .zero \g\()_image + (SETUP_SECTORS + 1) * 512 - .

\g\()_payload:
    .fill 0x200, 1, 0xf4                # the 32-bit entry, for loaders that have no 64-bit mode: HLT
    jmp \g\()_start
    library \g
    .skip DIRECTORIES - (. - \g\()_payload)
    .set page, 0                        # four page directories: the low 4 GiB, each address its own, in pages of 2 MiB
    .rept 2048
    .quad page * 0x200000 + 0x83        # present, writable, large
    .set page, page + 1
    .endr
.endm

.macro end_of_image g
    .balign 16
\g\()_payload_end:
    .globl keel_guest_\g\()_end
keel_guest_\g\()_end:
.endm

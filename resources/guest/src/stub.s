# The whole of ring 0. Each instruction here may be emulated at great cost, so there are few and they do little:
# three ways in (64-bit Linux, PVH, an application processor), the interrupt handlers, idling, and fault reports.
# Everything that looks like work (devices, the LAPIC, the protocol) is Rust in ring 3.
#
# Ring 3 enters ring 0 in one way on purpose: `hlt` at `idle_hlt`, which faults with #GP.

.set IMAGE, 0x100000
.set CODE0, 0x10                # selectors, laid out as Linux lays them out
.set DATA3, 0x2b
.set CODE3, 0x33
.set TSS0, 0x40
.set CR0_VALUE, 0x80000033      # PG NE ET MP PE
.set CR4_VALUE, 0x620           # OSXMMEXCPT OSFXSR PAE
.set LAPIC_EOI, 0xfee000b0
.set LAPIC_LVT0, 0xfee00350
.set CPUS, 8
.set RING0_SIZE, 192            # per CPU: a stack of 176 bytes, then 16 bytes that begin with the pending word
.set RING0_TOP, 176

.section .stub, "ax", @progbits

# ---- Ways in -------------------------------------------------------------------------------------------------------

.globl entry_linux64
entry_linux64:                  # rsi = zero page
    mov eax, offset page_tables
    mov cr3, rax
    mov eax, CR4_VALUE
    mov cr4, rax
    mov eax, CR0_VALUE
    mov cr0, rax
    lgdt [rip + gdt_pointer]
    xor edi, edi
enter_ring3:                    # edi = boot protocol, rsi = its parameters
    lidt [rip + idt_pointer]
    mov eax, TSS0
    ltr ax
    mov eax, LAPIC_LVT0
    mov dword ptr [rax], 0x10000        # masks the legacy interrupt controllers
    mov esp, offset boot_frame
    iretq

.code32
.globl entry_pvh
entry_pvh:                      # ebx = hvm_start_info, protected mode, paging off
    lgdt [gdt_pointer]
    mov eax, offset page_tables
    mov cr3, eax
    mov eax, CR4_VALUE
    mov cr4, eax
    mov ecx, 0xc0000080         # EFER
    mov eax, 0x100              # LME
    xor edx, edx
    wrmsr
    mov esi, ebx
    mov edi, 1
    mov eax, CR0_VALUE
    mov cr0, eax
    .byte 0xea                  # ljmp CODE0:enter_ring3
    .long enter_ring3
    .word CODE0
.code64

entry_ap:
    lidt [rip + idt_pointer]
    mov eax, dword ptr [rip + ap_tss]
    ltr ax
    mov edi, dword ptr [rip + ap_index]
    mov esp, offset ap_start
    iretq

# ---- Idling --------------------------------------------------------------------------------------------------------

# Called from ring 3. Returns after an interrupt; at once if one has arrived since ring 3 last cleared the pending word.
# The handlers below find the address of the EOI register in rax when they interrupt the stub's hlt.
.globl idle
idle:
    mov eax, LAPIC_EOI
idle_hlt:
    hlt
    ret

general_protection:             # [rsp]: error, rip, cs, rflags, rsp, ss, then the pending word
    cmp qword ptr [rsp + 8], offset idle_hlt
    jne 2f
    cmp dword ptr [rsp + 48], 0
    jne 1f
    sti
    hlt                         # handlers return straight to ring 3; an NMI or a spurious interrupt comes back here
    cli
1:  add rsp, 8
    inc qword ptr [rsp]         # past ring 3's hlt
    iretq
2:  push 13
    jmp fault

# ---- Interrupts ----------------------------------------------------------------------------------------------------

# Records the cause in the CPU's pending word and ends the interrupt. From the stub's hlt, unwinds both frames.
.macro interrupt name, bit
\name:
    test byte ptr [rsp + 8], 3
    jnz 1f
    or dword ptr [rsp + 88], \bit
    mov dword ptr [rax], 0
    add rsp, 48
    inc qword ptr [rsp]
    iretq
1:  or dword ptr [rsp + 40], \bit
    push rax
    mov eax, LAPIC_EOI
    mov dword ptr [rax], 0
    pop rax
    iretq
.endm

interrupt on_timer, 1
interrupt on_ipi, 2
interrupt on_serial, 4
interrupt on_virtio, 8
on_spurious:
    iretq

# ---- Faults --------------------------------------------------------------------------------------------------------

fault:                          # [rsp]: vector, error, rip, ...
    pop rdi
    pop rsi
    mov rdx, qword ptr [rsp]
    mov rcx, cr2
    mov esp, offset fault_frame
    iretq

.balign 8
boot_frame:
    .quad boot_main, CODE3, 0x202, boot_stack_top - 8, DATA3
fault_frame:
    .quad report_fault, CODE3, 0x002, fault_stack_top - 8, DATA3

# ---- Descriptors ---------------------------------------------------------------------------------------------------

# The image lies between 1 MiB and 1 MiB + 64 KiB up to here, so bits 16..31 of every address are 0x0010.
.macro gate handler
    .word \handler - IMAGE, CODE0
    .byte 0, 0x8e
    .word IMAGE >> 16
    .quad 0
.endm

.balign 16
idt:
    .set vector, 0
    .rept 32
    .if vector == 13
        gate general_protection
    .else
        gate fault_entries + 16 * vector
    .endif
    .set vector, vector + 1
    .endr
    gate on_timer               # 0x20
    gate on_ipi                 # 0x21
    gate on_serial              # 0x22
    gate on_virtio              # 0x23
    .fill 2 * (0x3f - 0x24), 8, 0
    gate on_spurious            # 0x3f
idt_end:

.balign 8
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff    # 0x10: ring 0, 64-bit code
    .quad 0x00cf93000000ffff    # 0x18: ring 0, data
    .quad 0
    .quad 0x00cff3000000ffff    # 0x28: ring 3, data
    .quad 0x00affb000000ffff    # 0x30: ring 3, 64-bit code
    .quad 0
    .set cpu, 0
    .rept CPUS                  # 0x40 + 16 * cpu
    .word tss_size - 1, tss + 240 * cpu - IMAGE
    .byte IMAGE >> 16, 0x89, 0, 0
    .quad 0
    .set cpu, cpu + 1
    .endr
.globl gdt_end
gdt_end:

idt_pointer:
    .word idt_end - idt - 1
    .quad idt
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

# One per CPU, 240 bytes apart. The bitmap lets ring 3 use the i8042 (0x60, 0x64) and COM1 (0x3f8-0x3ff), and no more.
.balign 16
tss:
    .set cpu, 0
    .rept CPUS
    .long 0
    .if cpu == 0
    .quad boot_ring0 + RING0_TOP
    .else
    .quad ap_ring0 + RING0_SIZE * cpu + RING0_TOP
    .endif
    .fill 90, 1, 0
    .word 104                   # where the bitmap begins
    .fill 12, 1, 0xff
    .byte 0xee
    .fill 114, 1, 0xff
    .byte 0x00, 0xff
    .balign 16
    .set cpu, cpu + 1
    .endr
.set tss_size, 104 + 129

.balign 16
fault_entries:
    .set vector, 0
    .rept 32
    .if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
    push 0
    .endif
    push vector
    jmp fault
    .balign 16
    .set vector, vector + 1
    .endr

# ---- Application processors ----------------------------------------------------------------------------------------

# Copied below 1 MiB by ring 3; runs in real mode with cs:ip = here:0 and goes to long mode in one step.
.code16
.globl trampoline
trampoline:
    mov eax, offset page_tables
    mov cr3, eax
    mov eax, CR4_VALUE
    mov cr4, eax
    mov ecx, 0xc0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16  # lgdt cs:[trampoline_gdt], 32-bit base
    .word trampoline_gdt - trampoline
    mov eax, CR0_VALUE
    mov cr0, eax
    .byte 0x66, 0xea                    # ljmp CODE0:entry_ap
    .long entry_ap
    .word CODE0
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
.globl trampoline_end
trampoline_end:
.code64

# Filled in by ring 3 for one processor at a time.
.section .data.ap, "aw", @progbits
.balign 8
.globl ap_start
ap_start:
    .quad ap_main, CODE3, 0x202
.globl ap_stack
ap_stack:
    .quad 0, DATA3
.globl ap_index
ap_index:
    .long 0
.globl ap_tss
ap_tss:
    .long 0

# ---- Page tables ---------------------------------------------------------------------------------------------------

# The first 4 GiB, identity-mapped for ring 3 in 2 MiB pages; accessed and dirty already, so that nobody writes here but
# `machine.rs`, once, where there is RAM above.
.section .tables, "a", @progbits
.balign 4096
page_tables:
    .quad page_directory_pointers + 0x67
    .fill 511, 8, 0
.globl page_directory_pointers
page_directory_pointers:
    .quad page_directories + 0x67
    .quad page_directories + 0x1067
    .quad page_directories + 0x2067
    .quad page_directories + 0x3067
    .fill 508, 8, 0
page_directories:
    .set frame, 0
    .rept 2048
    .if frame < 0xc0000000
    .quad frame + 0xe7
    .else
    .quad frame + 0xff          # devices: not cached
    .endif
    .set frame, frame + 0x200000
    .endr

# ---- Notes ---------------------------------------------------------------------------------------------------------

.section .note.pvh, "a", @note
    .long 4, 8, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad entry_pvh

# ---- Memory --------------------------------------------------------------------------------------------------------

.section .stack.boot, "aw", @nobits
    .skip 32768
.globl boot_stack_top
boot_stack_top:

.section .bss.fault, "aw", @nobits
.balign 16
    .skip 4096
fault_stack_top:

.section .bss.ring0, "aw", @nobits
.balign 16
.globl ap_ring0
ap_ring0:
    .skip RING0_SIZE * CPUS

.section .hot.ring0, "aw", @nobits
.balign 16
.globl boot_ring0
boot_ring0:
    .skip RING0_SIZE
.text

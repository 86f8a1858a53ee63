/*
 * A tiny guest that proves that an accelerator really runs guests: from the
 * reset vector through real, protected and long mode with paging and an MSR
 * write, then work that an emulator of single instructions cannot do in time,
 * then a last word through the debug exit port.
 *
 * It is the last 512 bytes of a 64 KiB BIOS image, at 0xfffffe00. Build:
 *   as --64 -o guest.o probe-guest.S
 *   ld -m elf_x86_64 -Ttext 0xfffffe00 --oformat binary -o guest.bin guest.o
 */
        .text
        .globl _start
        .equ PML4, 0x1000
        .equ PDPT, 0x2000
        .equ PD_LOW, 0x3000
        .equ PD_HIGH, 0x4000

        .code32
_start:
protected:
        mov $0x10, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        mov $0x8000, %esp
        /* Page tables: the first 2 MiB, and the last 2 MiB below 4 GiB, mapped to themselves. */
        cld
        xor %eax, %eax
        mov $PML4, %edi
        mov $0x1000, %ecx
        rep stosl
        movl $(PDPT + 3), PML4
        movl $(PD_LOW + 3), PDPT
        movl $(PD_HIGH + 3), PDPT + 3 * 8
        movl $0x83, PD_LOW
        movl $0xffe00083, PD_HIGH + 511 * 8
        mov %cr4, %eax
        or $0x20, %eax
        mov %eax, %cr4
        mov $PML4, %eax
        mov %eax, %cr3
        mov $0xc0000080, %ecx
        rdmsr
        or $0x100, %eax
        wrmsr
        mov %cr0, %eax
        or $0x80000001, %eax
        mov %eax, %cr0
        ljmp $0x18, $long
        .code64
long:
        /* 20 million rounds through memory: 20 ms on a CPU, 0.2 s translated. */
        mov $20000000, %ecx
        mov $0x9000, %edi
1:      add %rcx, (%rdi)
        dec %ecx
        jnz 1b
        xor %eax, %eax
        cpuid
        mov $0x10, %al
        mov $0xf4, %dx
        out %al, %dx
2:      hlt
        jmp 2b

        .balign 8
gdt:    .quad 0
        .quad 0x00cf9b000000ffff        /* 0x08 code, 32 bits */
        .quad 0x00cf93000000ffff        /* 0x10 data */
        .quad 0x00af9b000000ffff        /* 0x18 code, 64 bits */
gdtr:   .word 4 * 8 - 1
        .long gdt

        .code16
real:
        cli
        lgdtl %cs:gdtr - 0xffff0000
        mov %cr0, %eax
        or $1, %eax
        mov %eax, %cr0
        ljmpl $0x08, $protected

        .org 0x1f0
reset:
        jmp real
        .org 0x200

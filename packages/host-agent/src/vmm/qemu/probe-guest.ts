/** The assembled probe-guest.S, as a BIOS image. */

const BIOS_BYTES = 64 << 10;
/** Where the source begins: 512 bytes below the end of the address space. */
const CODE_OFFSET = BIOS_BYTES - 512;
const RESET_OFFSET = BIOS_BYTES - 16;

const CODE =
  "uBAAAACO2I7AjtC8AIAAAPwxwL8AEAAAuQAQAADzq8cFABAAAAMgAADHBQAgAAADMAAAxwUYIAAA" +
  "A0AAAMcFADAAAIMAAADHBfhPAACDAOD/DyDgg8ggDyLguAAQAAAPIti5gAAAwA8yDQABAAAPMA8g" +
  "wA0BAACADyLA6oL+//8YALkALTEBvwCQAABIAQ//yXX5McAPorAQZrr0AO706/2NtAAAjXQAAAAA" +
  "AAAAAAD//wAAAJvPAP//AAAAk88A//8AAACbrwAfAKj+///6LmYPARbI/g8gwGaDyAEPIsBm6gD+" +
  "//8I";
const RESET = "e9dbfe";

/** With `isa-debug-exit` at this port, QEMU's exit code then says that the guest came to its end. */
export const PROBE_EXIT_PORT = 0xf4;
/** The guest writes 0x10, of which QEMU makes (0x10 << 1) | 1. */
export const PROBE_EXIT_CODE = 33;

export function probeBios(): Buffer {
  const image = Buffer.alloc(BIOS_BYTES);
  Buffer.from(CODE, "base64").copy(image, CODE_OFFSET);
  Buffer.from(RESET, "hex").copy(image, RESET_OFFSET);
  return image;
}

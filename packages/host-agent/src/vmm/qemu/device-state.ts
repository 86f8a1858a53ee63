/**
 * Putting a device state stream together.
 *
 * A frozen clone saves its devices without memory (`xen-save-devices-state`).
 * To load them, QEMU wants an ordinary migration stream, memory sections
 * included, although with x-ignore-shared those hold no page of the guest. So
 * the stream is: the base's own stream up to its first device section, the
 * saved device sections, an empty description.
 *
 * Format: QEMU docs/devel/migration.rst "Stream structure"; migration/savevm.c of 7.2.
 */

const QEMU_VM_FILE_MAGIC = 0x5145564d;
const QEMU_VM_FILE_VERSION = 3;
const HEADER_BYTES = 8;
const SECTION_FULL = 0x04;
const SECTION_FOOTER = 0x7e;
const FOOTER_BYTES = 5;
/** Type 6 (VMDESCRIPTION), length 0. */
const EMPTY_DESCRIPTION = Buffer.of(0x06, 0, 0, 0, 0);

function checkHeader(stream: Buffer, what: string): void {
  if (
    stream.length <= HEADER_BYTES + 1 ||
    stream.readUInt32BE(0) !== QEMU_VM_FILE_MAGIC ||
    stream.readUInt32BE(4) !== QEMU_VM_FILE_VERSION
  ) {
    throw new Error(`${what} is not a QEMU stream of version ${QEMU_VM_FILE_VERSION}`);
  }
}

/** Type, id, name, instance and version of the full section at the start of `sections`. */
function sectionHead(sections: Buffer): Buffer {
  const nameLength = sections[5];
  if (sections[0] !== SECTION_FULL || nameLength === undefined || sections.length < 6 + nameLength + 8) {
    throw new Error("a device state must begin with a full section");
  }
  return sections.subarray(0, 6 + nameLength + 8);
}

/** The device sections of what `xen-save-devices-state` wrote, their end mark included. */
export function deviceSections(saved: Buffer): Buffer {
  checkHeader(saved, "the saved device state");
  const sections = saved.subarray(HEADER_BYTES);
  sectionHead(sections);
  return sections;
}

/**
 * How many bytes of a base's stream come before its first device section.
 * `sections` are of the same VM at the same moment, so that section's head is known exactly.
 */
export function memoryPrefixBytes(stream: Buffer, sections: Buffer): number {
  checkHeader(stream, "the base's stream");
  const head = sectionHead(sections);
  const at = stream.indexOf(head);
  if (at < HEADER_BYTES + FOOTER_BYTES || stream[at - FOOTER_BYTES] !== SECTION_FOOTER) {
    throw new Error("the base's stream has no device section where one must follow its memory");
  }
  if (stream.indexOf(head, at + 1) >= 0) throw new Error("the base's first device section is not unique");
  return at;
}

export function composeStream(memoryPrefix: Buffer, sections: Buffer): Buffer {
  return Buffer.concat([memoryPrefix, sections, EMPTY_DESCRIPTION]);
}

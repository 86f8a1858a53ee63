/** What `image` commands print. */
import type { GuestImage, ImageProgress } from "../image/guest-image.ts";

/** Text: a line a message. JSON: one `{"type":"progress",…}` a line. */
export function printImageProgress(
  format: "json" | "text",
  write: (text: string) => void,
): (event: ImageProgress) => void {
  return (event) => {
    if (format === "json") return write(`${JSON.stringify({ type: "progress", ...event })}\n`);
    const part = event.fraction === undefined ? "" : ` (${Math.round(event.fraction * 100)} %)`;
    write(`${event.image}: ${event.message}${part}\n`);
  };
}

export function renderImages(images: readonly GuestImage[]): string {
  if (images.length === 0) return "No images yet: rookery-agent image build\n";
  const width = Math.max(...images.map(({ name }) => name.length));
  return images
    .map(({ name, hash, createdAt, rootDisk }) => {
      const sizeMb = Math.round(rootDisk.sizeBytes / (1 << 20));
      return `${name.padEnd(width)}  ${hash.slice(0, 12)}  ${createdAt.toISOString()}  ${sizeMb} MB\n`;
    })
    .join("");
}

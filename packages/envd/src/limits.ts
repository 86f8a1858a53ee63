/**
 * Every bound of envd, with its reason. envd shares a guest of 512 MB with
 * what users run; no request may cost it more than a few megabytes.
 */
const KIB = 1024;
const MIB = 1024 * KIB;

/** PATH_MAX of Linux, its final NUL included. */
export const MAX_PATH_BYTES = 4095;
/** MAX_ARG_STRLEN of Linux (32 pages), its final NUL included: execve refuses longer strings. */
export const MAX_ARGUMENT_BYTES = 128 * KIB - 1;
/** Linux grants a quarter of the 8 MiB stack; the rest of it is for pointers and the auxiliary vector. */
export const MAX_COMMAND_BYTES = 1.5 * MIB;
export const MAX_TAG_BYTES = 256;
/** Tracked at once. Far beyond what a guest bears, so it only stops runaway clients. */
export const MAX_PROCESSES = 4096;
/** Programs in the moment of their start; the others wait (they are bounded by MAX_CONNECTIONS). */
export const MAX_LAUNCHES = 2;
/** How long and how many ends of processes can still be read by Connect (E2B keeps them 30 s). */
export const ENDED_RETENTION_MS = 30_000;
export const MAX_ENDED = 256;
/** Descendants that hold a pipe of an ended process: their output is read and dropped. */
export const MAX_ORPHAN_PIPES = 256;

/** A subscriber that holds more unsent output than this pauses the process's pipes. */
export const SUBSCRIBER_HIGH_BYTES = 256 * KIB;
export const SUBSCRIBER_LOW_BYTES = 64 * KIB;
/** Streams on one process. */
export const MAX_SUBSCRIBERS = 64;
/** Input that a process has not read yet. */
export const MAX_PENDING_INPUT_BYTES = 4 * MIB;
/** One Connect message: 4 MiB of input in base64, and room. */
export const MAX_MESSAGE_BYTES = 8 * MIB;
export const DEFAULT_KEEPALIVE_MS = 90_000;
/** A keepalive each second is what a client may ask for; more is load without use. */
export const MIN_KEEPALIVE_MS = 1_000;
/** setTimeout's longest; 24 days. */
export const MAX_TIMEOUT_MS = 2 ** 31 - 1;

/** An answer of ListDir: about 15 MB of JSON at the most, a folder of that size is better read by `find`. */
export const MAX_LIST_ENTRIES = 50_000;
export const MAX_LIST_DEPTH = 64;
/** Entries read before other requests get their turn. */
export const LIST_SLICE = 256;

export const MAX_INIT_BYTES = 1 * MIB;
export const MAX_HEADER_BYTES = 16 * KIB;
export const MAX_CONNECTIONS = 1024;
/** A connection that sends no request line, or a body that stands still, is closed after this. */
export const IDLE_CONNECTION_MS = 75_000;
export const BODY_IDLE_MS = 120_000;

/** Files in one multipart upload. */
export const MAX_UPLOAD_PARTS = 1000;
/** Bytes gathered before they go to the disk in one call. */
export const WRITE_BATCH_BYTES = 512 * KIB;
export const READ_CHUNK_BYTES = 256 * KIB;

/** User extended attributes that carry X-Metadata-*: what E2B allows. */
export const MAX_METADATA_KEY_BYTES = 246;
export const MAX_METADATA_BYTES = 4096;

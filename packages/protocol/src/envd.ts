/** envd's services and messages (proto/process, proto/filesystem). */
export * as process from "./gen/process/process_pb.js";
export * as filesystem from "./gen/filesystem/filesystem_pb.js";

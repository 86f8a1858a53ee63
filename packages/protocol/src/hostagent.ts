/** The host agent's service and messages (proto/hostagent/v1). */
export * from "./gen/hostagent/v1/hostagent_pb.js";

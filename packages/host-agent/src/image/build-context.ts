/**
 * What every stage of a build works with.
 */
import type { run } from "../host/run.ts";
import type { ImageStep } from "./guest-image.ts";

export interface BuildContext {
  run: typeof run;
  /** DATA/images. */
  imagesDir: string;
  /** Plain files of packages/guest-image. */
  guestFilesDir: string;
  signal: AbortSignal;
  report(step: ImageStep, message: string, fraction?: number): void;
}

/** Of every file that we date: 2024-01-01, so that equal inputs give equal files. */
export const SOURCE_DATE_EPOCH = 1_704_067_200;
